"""The weights of a checkpoint as plain tensors, whatever ZeRO stage and number of ranks wrote it.

DeepSpeed's own consolidation maps the optimizer files and hands out each parameter when it is asked for, so that a
model need not fit in memory twice. Around it stands the guard that it lacks: no file may execute code while it loads.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.errors import BadInput

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def safe_unpickling() -> Iterator[None]:
    """`torch.load` inside refuses every class but tensors and the four plain ones that DeepSpeed's files hold.

    DeepSpeed asks for full unpickling; the environment variable, which torch reads at each load, overrules it.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


class Weights(Mapping[str, Tensor]):
    """Names to fp32 tensors; a tensor is put together from the ranks' shares each time it is asked for.

    Tied parameters appear under each of their names, persistent buffers among the parameters.
    """

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].contiguous().detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor, without putting it together."""
        return self._tensors[name].shape

    def with_prefix(self, prefix: str) -> Weights:
        """The tensors whose names start with `prefix`, under the rest of their names."""
        return Weights({name[len(prefix) :]: t for name, t in self._tensors.items() if name.startswith(prefix)})


def open_weights(checkpoint: Path) -> Weights:
    """The weights in `checkpoints/step-N`, read from the DeepSpeed files of all its ranks.

    The caller has checked the checkpoint against its manifest (`pretrain.checkpoint.verify`).

    Raises:
        BadInput: it is not one of DeepSpeed's, or a file of it is of another checkpoint or would execute code.
    """
    from pretrain.checkpoint.loading import check_identities
    from pretrain.checkpoint.manifest import read_manifest

    check_identities(checkpoint, read_manifest(checkpoint))
    return read_zero_folder(checkpoint / "deepspeed")


def read_zero_folder(folder: Path) -> Weights:
    """The weights in a folder that DeepSpeed's `save_checkpoint` wrote (ZeRO 0, 1, 2 or 3), unverified.

    Raises:
        BadInput: the folder holds no DeepSpeed checkpoint, or a file of it that would execute code.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    latest = folder / "latest"
    if not latest.is_file():
        raise BadInput(f"{folder}: no DeepSpeed checkpoint (it has no file `latest`)")
    tag = latest.read_text().strip()
    if tag != Path(tag).name:
        raise BadInput(f"{latest}: {tag!r} is not the name of a folder beside it")
    try:
        with safe_unpickling():
            if optimizers := sorted((folder / tag).glob("*zero_pp_rank_*optim_states.pt")):
                if "zero_stage" not in _optimizer_state(optimizers[0]):
                    return _of_bf16_stage1(folder, len(optimizers))
                # It prints and draws progress bars; a caller's standard output may be JSON.
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    return Weights(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag, lazy_mode=True))
            return _without_zero(folder / tag / "mp_rank_00_model_states.pt")
    except torch.serialization.pickle.UnpicklingError as error:
        raise BadInput(f"{folder}: refused, a file would execute code when loaded ({_first_line(error)})") from error
    except FileNotFoundError as error:
        raise BadInput(f"{folder}: an incomplete DeepSpeed checkpoint ({error})") from error


class _Whole:
    """A parameter in the ranks' pieces, as `Weights` asks for it."""

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter
        self.shape = torch.Size(parameter.shape)

    def contiguous(self) -> Tensor:
        whole: Tensor = self._parameter.tensor("fp32")
        return whole


def _optimizer_state(file: Path) -> dict[str, Any]:
    return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True)["optimizer_state_dict"])


def _of_bf16_stage1(folder: Path, world_size: int) -> Weights:
    """ZeRO 1 in bf16, whose files DeepSpeed's own consolidation refuses: they do not say which stage wrote them."""
    from pretrain.zero_reader import open_saved

    saved = open_saved(folder, world_size)
    tensors: dict[str, Any] = {parameter.name: _Whole(parameter) for parameter in saved.parameters}
    tensors |= {name: tensors[first] for name, first in saved.tied.items()}
    tensors |= {name: b.float() if b.is_floating_point() else b for name, b in saved.buffers.items()}
    return Weights(tensors)


def _without_zero(file: Path) -> Weights:
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return Weights({name: t.float() if t.is_floating_point() else t for name, t in state["module"].items()})


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
