"""accelerate and DeepSpeed: the only file that knows either.

The DeepSpeed config is derived from ours, with numbers. What is worked around here was measured on DeepSpeed 0.19.8
and accelerate 1.15.0: a gloo backend must be named or every rank believes that it is alone; DeepSpeed compiles a
shared-memory op with gcc at start, which only inference uses and whose lock a killed process leaves behind;
weights-only loading must be forced, because DeepSpeed loads pickles.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipelines.errors import BadInput
from pretrain.accelerate_settings import FIELDS_VARIABLE
from pretrain.config import Config
from pretrain.consolidate import safe_unpickling
from pretrain.model.backbones import family
from pretrain.norm_gate import Judge, NormGate
from pretrain.zero_partitions import Read, clear_padding, fill
from pretrain.zero_reader import names_entry

_NO_DECAY = ("norm", "logit_scale", "logit_bias", "per_dim_scale", "position_embedding_table", ".token")


def prepare_environment() -> None:
    """Set what must be in the environment before torch's and accelerate's state exists. Harmless where it is set.

    One process without a launcher becomes a world of one, so that every path below is the same.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0",
            WORLD_SIZE="1",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            # Else torch follows it, and so must we: with another number of threads, sums round differently.
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    # DeepSpeed calls collectives by names that torch is about to change; nobody who trains can do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    for name in ("deepspeed", "DeepSpeed", "accelerate", "torch.distributed.elastic"):
        logging.getLogger(name).setLevel(logging.ERROR)


def global_rank() -> int:
    """This process's rank as the launcher says it, before any process group exists."""
    return int(os.environ.get("RANK", "0"))


def global_world_size() -> int:
    """Number of ranks as the launcher says it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Engine:
    """One rank's hold on the process group, the wrapped model and its optimizer."""

    def __init__(self, config: Config) -> None:
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
            raise BadInput(
                "accelerate was started with --cpu, which silently drops DeepSpeed; "
                "use `accelerate launch --use_deepspeed`"
            )
        _check_device(config)
        # accelerate refuses a DeepSpeed config of ours beside fields of its own config file, which agree by now.
        os.environ.pop(FIELDS_VARIABLE, None)
        import deepspeed
        from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
        from deepspeed.utils import logger as deepspeed_logger
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        deepspeed_logger.setLevel(logging.ERROR)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.config = config
        self.accumulation = accumulation_steps(config, global_world_size())
        on_gpu = torch.cuda.is_available()
        timeout = timedelta(seconds=config.engine.collective_timeout_seconds)
        self._accelerator = Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config(config, global_world_size())),
            kwargs_handlers=[InitProcessGroupKwargs(backend="nccl" if on_gpu else "gloo", timeout=timeout)],
        )
        # With ZeRO-3 transformers would now build models already cut into pieces, and draw other initial weights.
        unset_hf_deepspeed_config()
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        if not self.world_size == self._accelerator.num_processes == global_world_size():
            raise RuntimeError(
                f"accelerate sees {self._accelerator.num_processes} processes, torch.distributed {self.world_size}, "
                f"the launcher {global_world_size()}"
            )
        if self._accelerator.distributed_type.value != "DEEPSPEED":
            raise RuntimeError(f"accelerate runs {self._accelerator.distributed_type.value} instead of DeepSpeed")
        self.device = self._accelerator.device
        self.module: Any = None
        self._norm: float | None = None

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def prepare(self, model: nn.Module) -> None:
        """Wrap a model; afterwards `module` is DeepSpeed's engine around it."""
        groups = parameter_groups(model, self.config)
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._names = [[names[parameter] for parameter in group["params"]] for group in groups]
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        train = self.config.train
        optimizer = torch.optim.AdamW(
            groups, lr=train.learning_rate, betas=(train.beta1, train.beta2), eps=train.epsilon, foreach=True
        )
        self.module, _ = self._accelerator.prepare(model, optimizer)
        if self.config.engine.zero_stage == 3:
            clear_padding(self.module.optimizer)
        self._gate = NormGate(self.module.optimizer) if self.config.engine.zero_stage else None

    @property
    def model(self) -> Any:
        """The model itself."""
        return self.module.module

    def backward(self, loss: Tensor) -> None:
        """Backpropagate this rank's share of a loss that is a sum over ranks and micro-batches.

        DeepSpeed divides by the accumulation steps and averages over ranks; both are undone here.
        """
        self.module.backward(loss * (self.world_size * self.accumulation))

    def accumulate(self) -> None:
        """After each micro-batch of a step but the last."""
        self.module.step()

    def update(self, learning_rate: float, judge: Judge) -> bool:
        """After the last micro-batch of a step: reduce, have the norm judged, clip and update, or let the step go.

        Args:
            learning_rate: the schedule's; each parameter group has its factor on it.
            judge: asked with the norm of the whole gradient before clipping, the same number on every rank.

        Returns:
            Whether the weights were updated. Where not, weights and moments are untouched and the gradient is gone.
        """
        for group in self.module.optimizer.param_groups:
            group["lr"] = learning_rate * group["scale"]
        if self._gate is None:
            return self._update_without_zero(judge)
        self._gate.open_for(judge)
        self.module.step()
        if self._gate.norm is None:
            # DeepSpeed saw what is not finite in the gradient itself, and did not come to a norm.
            judge(math.inf)
        self._norm = self._gate.norm
        if self.module.optimizer.overflow:
            self._gate.forget_refused()
            return False
        return True

    def _update_without_zero(self, judge: Judge) -> bool:
        gradients = {p: p.grad for p in self.model.parameters() if p.grad is not None}
        norm = torch.nn.utils.get_total_norm(gradients.values())
        self._norm = float(norm)
        accepted = judge(self._norm if math.isfinite(self._norm) else math.inf)
        if accepted and self.config.train.clip_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(gradients, self.config.train.clip_grad_norm, norm)
        for parameter in () if accepted else gradients:
            # AdamW leaves a parameter without a gradient alone, moments and all.
            parameter.grad = None
        self.module.step()
        return accepted

    def grad_norm(self) -> float | None:
        """Norm of the last step's whole gradient, before clipping; None where it was not finite."""
        return self._norm if self._norm is not None and math.isfinite(self._norm) else None

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum over ranks, in float64 and rank order on CPU."""
        if self.world_size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return list(total.tolist())

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def gather_objects(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        out: list[Any] = [None] * self.world_size
        dist.all_gather_object(out, value)
        return out

    def save(self, folder: Path, take: Callable[[Path, dict[str, Any]], None]) -> None:
        """Hand over what DeepSpeed saves of this rank (all ranks call it); nothing is written.

        Args:
            folder: where the files are to lie.
            take: gets each file's path below `folder` and its content, which lives on and changes with the next step.
        """
        from pretrain.checkpoint.manifest import ZERO_TAG
        from pretrain.checkpoint.zero_files import ZeroFiles

        self.module.checkpoint_engine = ZeroFiles(take)
        # It would leave scripts to convert the checkpoint with; nothing in ours is a program.
        self.module._copy_recovery_script = lambda path: None
        # `universal_checkpoint_info` keeps the files readable for DeepSpeed's own converter.
        client_state: dict[str, Any] = {"universal_checkpoint_info": {}, **names_entry(self._names)}
        self.module.save_checkpoint(str(folder), tag=ZERO_TAG, client_state=client_state, save_latest=False)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote in the same layout, weights-only whatever the environment says (all ranks call it)."""
        before = self._hyperparameters()
        with safe_unpickling():
            path, _ = self.module.load_checkpoint(str(folder), tag="state", load_lr_scheduler_states=False)
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")
        # DeepSpeed took these from the checkpoint; those of the config, which may have changed, hold.
        for group, settings in zip(self.module.optimizer.param_groups, before, strict=True):
            group.update(settings)
        if self._gate is not None and hasattr(self.module.optimizer, "clip_grad"):
            self.module.optimizer.clip_grad = self.config.train.clip_grad_norm

    def _hyperparameters(self) -> list[dict[str, Any]]:
        groups = self.module.optimizer.param_groups
        return [{name: value for name, value in group.items() if name != "params"} for group in groups]

    def fill(self, read: Read, steps: dict[str, float | None], buffers: dict[str, Tensor]) -> None:
        """Take weights and optimizer state from whole tensors, as `zero_partitions.fill` says (all ranks call it)."""
        fill(self.module, read, steps, buffers)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter, however it is cut up."""
        return self._shapes

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches a rank a step.

    Raises:
        BadInput: the global batch does not divide by the world, or the rank's share by the micro-batch.
    """
    batch = config.data.global_batch
    if batch % world_size:
        raise BadInput(f"data.global_batch {batch} does not divide by the {world_size} ranks of this run")
    share = batch // world_size
    micro = config.data.micro_batch or share
    if share % micro:
        raise BadInput(
            f"data.micro_batch {micro} does not divide a rank's share of the batch, {share} "
            f"(data.global_batch {batch} over {world_size} ranks)"
        )
    return share // micro


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """DeepSpeed's config of a run: every value a number, never "auto"."""
    engine = config.engine
    accumulation = accumulation_steps(config, world_size)
    bucket = engine.bucket_mb * 1_000_000 // 4
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": torch.cuda.is_available(),
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if engine.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": bucket // 10, "stage3_param_persistence_threshold": 10_000}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_batch_size": config.data.global_batch,
        "train_micro_batch_size_per_gpu": config.data.global_batch // world_size // accumulation,
        "gradient_accumulation_steps": accumulation,
        # Without ZeRO the engine clips itself, once the gradient is judged.
        "gradient_clipping": config.train.clip_grad_norm if engine.zero_stage else 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": engine.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Optimizer groups: one for each (part, with or without decay). Norms, biases, scalars and tokens do not decay.

    Each group carries `scale`, the factor on the schedule's learning rate.
    """
    part = family(config.model.family).part
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        where = part(name.removeprefix("backbone.")) if name.startswith("backbone.") else "heads"
        decays = parameter.ndim > 1 and not any(word in name for word in _NO_DECAY)
        groups.setdefault((where, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.train.weight_decay if decays else 0.0,
            "scale": config.train.learning_rate_scale.get(where, 1.0),  # type: ignore[call-overload]
        }
        for (where, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _check_device(config: Config) -> None:
    if config.engine.precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise BadInput(
            f"engine.precision bf16: {torch.cuda.get_device_name()} has no bf16; use --set engine.precision=fp32"
        )
