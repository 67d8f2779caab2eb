"""A frozen file is what `torch.save` would have written, whatever happens to the live state afterwards."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.checkpoint.snapshot import FrozenFile, HostBuffers
from pretrain.checkpoint.writer import Bytes, HashedFile, WriterThread, write_files


def state() -> dict[str, Any]:
    """Views of one storage, a tied tensor, a parameter, several types, an empty tensor, and what is no tensor."""
    flat = torch.arange(24, dtype=torch.float32)
    parameter = nn.Parameter(torch.randn(3, 2))
    return {
        "module": {"a": flat[:6].view(2, 3), "b": flat[8:24].view(4, 4).t(), "parameter": parameter},
        "tied": [parameter, parameter.data],
        "types": (torch.randn(5).bfloat16(), torch.tensor([True, False]), torch.tensor(7), torch.empty(0)),
        "large": torch.randn(300, 300),
        "numbers": {"step": 3, "betas": [0.9, 0.98]},
    }


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key in value for leaf in leaves(value[key])]
    return [leaf for one in value for leaf in leaves(one)] if isinstance(value, (list, tuple)) else [value]


def load(frozen: FrozenFile) -> tuple[Any, int]:
    file = io.BytesIO()
    frozen.write(file)
    size = file.tell()
    file.seek(0)
    return torch.load(file, weights_only=True), size


def test_it_holds_what_was_there_and_shares_what_was_shared() -> None:
    torch.manual_seed(0)
    live = state()
    expected_file = io.BytesIO()
    torch.save(live, expected_file)
    size = expected_file.tell()
    expected_file.seek(0)
    expected = torch.load(expected_file, weights_only=True)
    frozen = FrozenFile(live, HostBuffers(pinned=False))
    # What is large may not change until it is copied; all else may at once.
    live["module"]["b"].zero_()
    live["large"] += 1
    expected["large"] += 1
    frozen.copy()
    for leaf in leaves(live):
        if isinstance(leaf, Tensor):
            leaf.data.zero_()
    live["numbers"]["betas"].append("changed")
    found, found_size = load(frozen)
    # Names of storages may be a digit longer or shorter; nothing is written twice.
    assert abs(found_size - size) < 64 and found_size <= frozen.num_bytes
    assert len(leaves(found)) == len(leaves(expected))
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert (a.dtype, a.shape, a.stride(), a.requires_grad) == (b.dtype, b.shape, b.stride(), b.requires_grad)
            assert torch.equal(a, b)
        else:
            assert a == b
    module = found["module"]
    assert module["a"].untyped_storage().data_ptr() == module["b"].untyped_storage().data_ptr()
    assert found["tied"][0] is module["parameter"] and found["tied"][1].data_ptr() == module["parameter"].data_ptr()


def test_the_next_snapshot_uses_the_same_memory() -> None:
    buffers = HostBuffers(pinned=False)
    addresses = []
    for _ in range(3):
        buffers.start_again()
        addresses.append(sorted(buffers.take(size).data_ptr() for size in (4096, 4096, 100, 8 << 20)))
    assert addresses[0] == addresses[1] == addresses[2]
    buffers.start_again()
    buffers.take(100)
    buffers.start_again()
    assert list(buffers._free) == [100]


@pytest.mark.parametrize("sizes", [[], [1, 2, 3], [20 << 20], [5, 9 << 20, 7, 1 << 20, 8 << 20]])
def test_a_file_is_hashed_as_it_is_written(tmp_path: Path, sizes: list[int]) -> None:
    pieces = [bytes([number % 251]) * size for number, size in enumerate(sizes)]
    with HashedFile(tmp_path / "file") as file:
        for piece in pieces:
            file.write(piece)
    whole = b"".join(pieces)
    assert (tmp_path / "file").read_bytes() == whole
    assert file.entry(3) == {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest(), "rank": 3}
    with pytest.raises(FileExistsError):
        HashedFile(tmp_path / "file")


def test_the_thread_does_one_thing_after_the_other_and_keeps_what_came_of_it(tmp_path: Path) -> None:
    thread = WriterThread()
    works = [thread.start(lambda count: write_files(tmp_path, {"a/b": Bytes(b"xyz")}, 1, count)) for _ in range(2)]
    for work in works:
        work.wait(10)
    assert works[0].done and works[0].error is None and works[0].progress == 3
    assert works[0].result["a/b"]["bytes"] == 3
    error = works[1].error
    assert isinstance(error, FileExistsError) and error.filename == str(tmp_path / "a/b")
