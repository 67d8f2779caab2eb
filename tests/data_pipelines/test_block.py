"""One block of memory holds a batch, whatever its dtypes and shapes, and goes to another process as it is."""

from __future__ import annotations

import multiprocessing
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from data_pipelines.block import Block, allocate

WANTED = {
    "image": (torch.uint8, (3, 7)),
    "index": (torch.int64, (2,)),
    "audio": (torch.int16, (2, 6)),
    "none": (torch.int64, (0, 4)),
    "weight": (torch.float32, (2,)),
}


def filled(number: int) -> Block:
    block = allocate(WANTED)
    for array in block.arrays().values():
        assert not array.any()
        array[...] = np.arange(array.size).reshape(array.shape) + number
    return block


def check(block: Block, number: int) -> None:
    tensors = block.tensors()
    assert {name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()} == WANTED
    for one in tensors.values():
        assert torch.equal(one, (torch.arange(one.numel()) + number).to(one.dtype).view(one.shape))
        assert one.untyped_storage().data_ptr() == block.memory.untyped_storage().data_ptr()


def test_arrays_and_tensors_are_views_of_one_block() -> None:
    block = filled(0)
    check(block, 0)
    assert not block.memory.is_shared()
    starts = [start for start, *_ in block.places.values()]
    assert all(start % 64 == 0 for start in starts) and starts == sorted(starts)


class _Filled:
    def __getitem__(self, number: int) -> Block:
        return filled(number)


def _as_it_is(block: Any) -> Any:
    return block


def test_a_worker_stacks_where_its_parent_reads() -> None:
    fork: Any = multiprocessing.get_context("fork")
    loader: DataLoader[Block] = DataLoader(
        _Filled(),  # type: ignore[arg-type]
        sampler=range(5),
        batch_size=None,
        num_workers=1,
        collate_fn=_as_it_is,
        multiprocessing_context=fork,
    )
    blocks = list(loader)
    for number, block in enumerate(blocks):
        check(block, number)
        assert block.memory.is_shared()
    assert len({block.memory.data_ptr() for block in blocks}) == 5


def test_nothing_takes_nothing() -> None:
    assert allocate({}).tensors() == {}
