"""Real DeepSpeed checkpoints of two ranks, read back tensor by tensor; and one that would run code."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipelines.errors import BadInput
from pretrain.consolidate import read_zero_folder
from tests.ranks import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders zero-0 ... zero-3 and bf16-zero-1 ... bf16-zero-3, and the weights that they hold, beside them."""
    folder = tmp_path_factory.mktemp("zero")
    run_ranks("tests.pretrain.zero_ranks", [str(folder)], timeout=150)
    return folder


@pytest.mark.parametrize("name", ["zero-0", "zero-1", "zero-2", "zero-3", "bf16-zero-1", "bf16-zero-2", "bf16-zero-3"])
def test_every_stage_gives_back_the_weights_and_the_saved_buffers(checkpoints, name, capfd):
    saved = checkpoints / name
    weights = read_zero_folder(saved)
    expected = load_file(f"{saved}.safetensors")
    assert (
        set(weights)
        == set(expected)
        == {"embed.weight", "head.weight", "middle.weight", "middle.bias", "scale", "limit"}
    )
    for name, tensor in expected.items():
        assert weights.shape(name) == tensor.shape
        assert torch.equal(weights[name], tensor), name
        assert weights[name].dtype == torch.float32
        assert not weights[name].requires_grad
    assert set(weights.with_prefix("middle.")) == {"weight", "bias"}
    capfd.readouterr()
    read_zero_folder(saved)
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


def test_the_tied_parameter_is_there_under_both_names(checkpoints):
    weights = read_zero_folder(checkpoints / "zero-2")
    assert torch.equal(weights["head.weight"], weights["embed.weight"])


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_file_that_would_run_code_is_refused_and_does_not(checkpoints, stage, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(checkpoints / f"zero-{stage}", folder)
    victim = sorted((folder / "state").glob("*model_states.pt"))[0]
    torch.save({"module": {}, "evil": Payload(tmp_path / "owned")}, victim)
    with pytest.raises(BadInput, match="would execute code"):
        read_zero_folder(folder)
    assert not (tmp_path / "owned").exists()
    # The payload is a live one: the same file, unpickled without the guard, acts.
    with open(victim, "rb"):
        torch.load(victim, weights_only=False, pickle_module=pickle)
    assert (tmp_path / "owned").is_dir()


def test_what_is_no_checkpoint_is_named(checkpoints, tmp_path):
    with pytest.raises(BadInput, match="no DeepSpeed checkpoint"):
        read_zero_folder(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(BadInput, match="not the name of a folder"):
        read_zero_folder(tmp_path)
    (tmp_path / "latest").write_text("state")
    with pytest.raises(BadInput, match="incomplete"):
        read_zero_folder(tmp_path)
