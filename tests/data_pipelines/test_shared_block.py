"""One block of shared memory carries a batch, whatever its dtypes and shapes."""

from __future__ import annotations

import torch

from data_pipelines.shared_block import pack


def test_a_batch_comes_back_whole_and_shares_one_block() -> None:
    batch = {
        "keys": ["a", "b"],
        "image": torch.arange(21, dtype=torch.uint8).reshape(3, 7),
        "index": torch.tensor([-1, 1 << 62]),
        "audio": torch.arange(-6, 6, dtype=torch.int16).reshape(2, 6),
        "weight": torch.tensor([0.0, 1.5]),
        "none": torch.zeros(0, 4),
        "step": 3,
    }
    packed = pack(batch)
    found = packed.unpack()
    assert packed.block.is_shared() and found.keys() == batch.keys()
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value)
            assert found[name].untyped_storage().data_ptr() == packed.block.untyped_storage().data_ptr()
            assert found[name].data_ptr() % 64 == 0 or not value.numel()
        else:
            assert found[name] == value


def test_a_batch_without_tensors_comes_back() -> None:
    assert pack({}).unpack() == {}
    assert pack({"keys": []}).unpack() == {"keys": []}
