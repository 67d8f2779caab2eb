"""Started by test_consolidate.py on two ranks: saves one small model under ZeRO 0 to 3, also bf16, and what it was."""

from __future__ import annotations

import contextlib
import sys

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from torch import nn


class Small(nn.Module):
    """Tied weights, an odd number of elements, a one-element parameter, buffers that are saved and not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("limit", torch.tensor(float("inf")))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embed(x))) * self.scale


def save(stage: int, folder: str, rank: int, bf16: bool = False) -> None:
    torch.manual_seed(0)
    model = Small()
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim == 1]}]
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    settings["zero_allow_untested_optimizer"] = True
    settings |= {"bf16": {"enabled": bf16}, "data_types": {"grad_accum_dtype": "fp32"}}
    engine, *_ = deepspeed.initialize(model=model, config=settings, optimizer=torch.optim.AdamW(groups, lr=1e-2))
    x = torch.arange(8).view(2, 4) + rank
    engine.backward(nn.functional.cross_entropy(engine(x).flatten(0, 1), x.flatten()))
    engine.step()
    name = f"{folder}/{'bf16-' if bf16 else ''}zero-{stage}"
    engine.save_checkpoint(name, tag="state")
    if bf16:
        masters = {p: safe_get_full_fp32_param(p) for p in parameters}
        if rank == 0:
            values = model.state_dict(keep_vars=True).items()
            save_file({key: masters.get(value, value).clone().float() for key, value in values}, f"{name}.safetensors")
        return
    whole = deepspeed.zero.GatheredParameters(parameters) if stage == 3 else contextlib.nullcontext()
    with whole:
        if rank == 0:
            # safetensors refuses two names for one tensor; clones are two tensors.
            found = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
            save_file(found, f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    for zero_stage in range(4):
        save(zero_stage, sys.argv[1], torch.distributed.get_rank())
    for zero_stage in range(1, 4):
        save(zero_stage, sys.argv[1], torch.distributed.get_rank(), bf16=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
