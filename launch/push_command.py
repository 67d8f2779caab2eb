"""`triptych push`: an export folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from launch.json_output import print_json, say
from pretrain.hub import check_repo, list_uploads, push


def push_command(
    folder: Path,
    repo: str,
    public: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    as_json: bool = False,
) -> None:
    """Push, or with `dry_run` say what would be pushed; neither a token nor the network is needed for that.

    JSON is `{repo, public, revision, files: [{path, bytes}], total_bytes, commit_url}`; the last is null in a dry run.

    Raises:
        BadInput: see `pretrain.hub.push`.
    """
    check_repo(repo)
    uploads = list_uploads(folder)
    total = sum(upload.bytes for upload in uploads)
    where = f"{repo} ({'public' if public else 'private'}, branch {revision or 'main'})"
    if dry_run and not as_json:
        for upload in uploads:
            print(f"{upload.bytes:>15,}  {upload.path}")
        print(f"{total:>15,}  bytes in {len(uploads)} files would go to {where}")
        return
    commit_url = None
    if not dry_run:
        say(f"pushing {len(uploads)} files, {total:,} bytes, to {where}")
        commit_url = push(folder, repo, public, revision)
    if as_json:
        files = [{"path": upload.path, "bytes": upload.bytes} for upload in uploads]
        found = {"repo": repo, "public": public, "revision": revision, "files": files, "total_bytes": total}
        print_json({**found, "commit_url": commit_url})
    else:
        print(commit_url)
