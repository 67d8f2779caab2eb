"""`triptych push`, with the real client against a Hub on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.hub_server import TOKEN

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A folder with what makes an export one; the weights are noise."""
    folder = tmp_path / "export"
    (folder / "pretrain_heads").mkdir(parents=True)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "junk").write_text("x")
    (folder / "config.json").write_text('{"model_type": "gemma4"}')
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A model\n")
    (folder / "tokenizer_config.json").write_text("{}")
    weights = {"w": np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)}
    save_file(weights, folder / "model.safetensors")
    save_file(weights, folder / "pretrain_heads" / "model.safetensors")
    return folder


def push(
    tmp_path: Path, *arguments: str | Path, token: str | None = TOKEN, **environment: str
) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    env |= environment
    if token:
        env["HF_TOKEN"] = token
    command = [sys.executable, "-c", "from launch.cli import main; main()", "push", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env, cwd=tmp_path)


def files_of(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(".cache")}


def refused(done: subprocess.CompletedProcess[str], says: str) -> None:
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.stdout == "" and TOKEN not in done.stderr


def test_a_push_arrives_whole_and_private(hub: Any, export: Path, tmp_path: Path) -> None:
    done = push(tmp_path, export, "--repo", "lab/digits", "--json", HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["commit_url"].startswith(f"{hub.url}/lab/digits/commit/")
    repo = hub.repos["lab/digits"]
    assert repo.private
    assert {name: data for name, data in repo.branches["main"].items() if name != ".gitattributes"} == files_of(export)
    assert len(repo.commits) == 1
    assert TOKEN not in done.stdout + done.stderr


def test_pushing_again_replaces_shards_and_keeps_what_others_added(hub: Any, export: Path, tmp_path: Path) -> None:
    first = push(tmp_path, export, "--repo", "lab/digits", HF_ENDPOINT=hub.url)
    assert first.returncode == 0, first.stderr
    hub.repos["lab/digits"].branches["main"]["picture.png"] = b"png"
    data = (export / "model.safetensors").read_bytes()
    (export / "model.safetensors").unlink()
    (export / "model-00001-of-00001.safetensors").write_bytes(data)
    second = push(tmp_path, export, "--repo", "lab/digits", HF_ENDPOINT=hub.url)
    assert second.returncode == 0, second.stderr
    there = set(hub.repos["lab/digits"].branches["main"]) - {".gitattributes"}
    assert there == set(files_of(export)) | {"picture.png"}


def test_a_branch_and_public(hub: Any, export: Path, tmp_path: Path) -> None:
    done = push(tmp_path, export, "--repo", "lab/d", "--public", "--revision", "step-200", HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["lab/d"]
    assert not repo.private
    assert set(repo.branches["main"]) == {".gitattributes"}
    assert set(repo.branches["step-200"]) == {".gitattributes", *files_of(export)}


def test_a_private_push_does_not_land_in_a_public_repository(hub: Any, export: Path, tmp_path: Path) -> None:
    assert push(tmp_path, export, "--repo", "lab/d", "--public", HF_ENDPOINT=hub.url).returncode == 0
    done = push(tmp_path, export, "--repo", "lab/d", HF_ENDPOINT=hub.url)
    assert done.returncode == 2 and "is a public repository already: say --public" in done.stderr
    assert len(hub.repos["lab/d"].commits) == 1


def test_a_dry_run_needs_neither_token_nor_network(export: Path, tmp_path: Path) -> None:
    done = push(
        tmp_path, export, "--repo", "lab/d", "--dry-run", "--json", token=None, HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert {file["path"]: file["bytes"] for file in said["files"]} == {k: len(v) for k, v in files_of(export).items()}
    assert said["total_bytes"] == sum(map(len, files_of(export).values())) and said["commit_url"] is None
    plain = push(tmp_path, export, "--repo", "lab/d", "--dry-run", token=None)
    assert plain.returncode == 0 and "pretrain_heads/model.safetensors" in plain.stdout and "(private," in plain.stdout


@pytest.mark.parametrize(
    ("repo", "says"),
    [
        ("digits", "expected ORG/NAME"),
        ("a/b/c", "expected ORG/NAME"),
        ("lab/", "expected ORG/NAME"),
        ("lab/a b", "--repo lab/a b: Repo id must use"),
    ],
)
def test_wrong_names(export: Path, tmp_path: Path, repo: str, says: str) -> None:
    refused(push(tmp_path, export, "--repo", repo), says)


def test_no_token(export: Path, tmp_path: Path) -> None:
    done = push(tmp_path, export, "--repo", "lab/d", token=None)
    assert done.returncode == 2
    assert "error: no Hugging Face token: run `hf auth login`" in done.stderr


def test_what_is_no_export(export: Path, tmp_path: Path) -> None:
    refused(push(tmp_path, tmp_path / "nowhere", "--repo", "lab/d"), "no such folder")
    (export / "model.safetensors").unlink()
    refused(push(tmp_path, export, "--repo", "lab/d"), "not an export folder (model*.safetensors is missing)")


def test_what_the_hub_refuses(hub: Any, export: Path, tmp_path: Path) -> None:
    cases = (
        ("lab/d", "hf_wrong", "the token is not valid (401)"),
        ("not-mine/d", TOKEN, "the token may not write there (403)"),
    )
    for repo, token, says in cases:
        done = push(tmp_path, export, "--repo", repo, token=token, HF_ENDPOINT=hub.url)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    offline = push(tmp_path, export, "--repo", "lab/d", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2 and "HF_HUB_OFFLINE is set" in offline.stderr, offline.stderr
    nobody = push(tmp_path, export, "--repo", "lab/d", HF_ENDPOINT="http://127.0.0.1:9")
    assert nobody.returncode == 2 and "cannot reach the Hub at http://127.0.0.1:9" in nobody.stderr, nobody.stderr
