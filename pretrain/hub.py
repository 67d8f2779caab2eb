"""From an export folder to a model repository on the Hugging Face Hub.

A push is private unless public is asked for, and never makes something public by landing in a repository that already
is. The token comes from the environment or the Hub client's own file, and is not printed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from data_pipelines.errors import BadInput

IGNORED = (".git/*", "*/.git/*", ".cache/*", "*/.cache/*", "*/__pycache__/*", ".DS_Store", "*/.DS_Store")
# An earlier push with more shards would leave some behind, and loaders glob for them.
REPLACED = ("*.safetensors", "*.safetensors.index.json")
_NEEDED = ("config.json", "README.md", "tokenizer_config.json")


@dataclass(frozen=True)
class Upload:
    """One file of a push."""

    path: str
    """Relative to the folder, with slashes."""
    bytes: int


def list_uploads(folder: Path) -> list[Upload]:
    """The files that a push of `folder` would send, sorted by path.

    Raises:
        BadInput: `folder` is no export folder.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder")
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if not any(folder.glob("model*.safetensors")):
        missing.append("model*.safetensors")
    if missing:
        raise BadInput(f"{folder}: not an export folder ({missing[0]} is missing); `triptych export` makes one")
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    return [
        Upload(name, (folder / name).stat().st_size)
        for name in names
        if not any(fnmatch(name, pattern) for pattern in IGNORED)
    ]


def check_repo(repo: str) -> None:
    """Refuse a name that the Hub would refuse, before anything is sent.

    Raises:
        BadInput: `repo` is not ORG/NAME.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if repo.count("/") != 1 or not all(repo.split("/")):
        raise BadInput(f"--repo {repo}: expected ORG/NAME, for example --repo my-lab/triptych-base")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = str(error).replace(f": '{repo}'", "")
        raise BadInput(f"--repo {repo}: {reason}") from None


def push(folder: Path, repo: str, public: bool = False, revision: str | None = None) -> str:
    """Upload an export folder as one commit and return the commit's address.

    Args:
        folder: what `triptych export` wrote.
        repo: ORG/NAME; made where there is none.
        public: whether a new repository may be seen by everyone; also allows pushing to one that already can.
        revision: branch to push to, made where there is none; the default is the main one.

    Raises:
        BadInput: no export folder, no such name, no token, or the Hub refuses.
    """
    uploads = list_uploads(folder)
    check_repo(repo)
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    if not get_token():
        raise BadInput("no Hugging Face token: run `hf auth login`, or set HF_TOKEN in the environment")
    api = HfApi(library_name="triptych")
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.model_info(repo).private:
            raise BadInput(f"{repo} is a public repository already: say --public to push to it")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            revision=revision,
            commit_message=f"Upload {folder.resolve().name} ({len(uploads)} files) with Triptych",
            ignore_patterns=list(IGNORED),
            delete_patterns=list(REPLACED),
        )
    except OfflineModeIsEnabled:
        raise BadInput("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it") from None
    except HfHubHTTPError as error:
        raise BadInput(f"the Hub refuses the push to {repo}: {_reason(error)}") from None
    except (HTTPError, OSError) as error:
        raise BadInput(f"cannot reach the Hub at {api.endpoint}: {_one_line(str(error))}") from None
    return str(commit.commit_url)


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    known = {
        401: "the token is not valid (401)",
        403: "the token may not write there (403)",
        404: "there is no such repository or branch, or the token may not see it (404)",
        412: "somebody else pushed at the same time (412); try again",
    }
    message = getattr(error, "server_message", None) or str(error)
    return known.get(int(status or 0), _one_line(message))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
