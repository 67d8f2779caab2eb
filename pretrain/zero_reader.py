"""DeepSpeed's checkpoint files as parameters: whatever ZeRO stage and number of ranks wrote them.

DeepSpeed's own converter (`ds_to_universal`) was read and not taken, in 0.19.8: it leaves ZeRO 0 out, ZeRO 1 and 2 look
in its result for keys that ZeRO 3 does not write and the other way round, it gives every parameter group the first
one's hyperparameters under ZeRO 3, and it unpickles freely. What the files say is simple enough: each rank holds, for
each group of parameters, one flat vector of master weights and of each moment. The files are mapped, not read; a
parameter comes together when it is asked for.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.errors import BadInput
from pretrain.consolidate import safe_unpickling

MOMENTS = ("exp_avg", "exp_avg_sq")
_RANK_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_NAMES = "parameter_names"


@dataclass
class SavedParameter:
    """One parameter with its optimizer state, in the pieces that the ranks hold, first rank first."""

    name: str
    shape: tuple[int, ...]
    pieces: dict[str, list[Tensor]] = field(default_factory=dict)
    """1-D pieces of `fp32` (the master weights) and of each moment; no moments where nothing was updated yet."""
    steps: float | None = None
    """Updates that the moments have seen."""

    @property
    def kinds(self) -> list[str]:
        """The tensors that there are."""
        return list(self.pieces)

    def tensor(self, kind: str) -> Tensor:
        """One of them whole, as fp32 of the parameter's shape."""
        flat = torch.cat([piece.reshape(-1) for piece in self.pieces[kind]])
        # ZeRO 3 fills the last rank's piece up.
        return flat[: self.numel].reshape(self.shape).float().contiguous()

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class SavedModel:
    """All that DeepSpeed's files of one checkpoint hold."""

    parameters: list[SavedParameter]
    buffers: dict[str, Tensor]
    tied: dict[str, str] = field(default_factory=dict)
    """Further names of parameters, and the name that each is saved under."""


def names_entry(names: list[list[str]]) -> dict[str, Any]:
    """What a save adds to DeepSpeed's client state: the parameters' names, group by group, which ZeRO 0 leaves out."""
    return {_NAMES: names}


def open_saved(folder: Path, world_size: int) -> SavedModel:
    """Map the files that DeepSpeed wrote into `checkpoints/step-N/deepspeed` from `world_size` ranks.

    The caller has checked them against the manifest.

    Raises:
        BadInput: a file is missing, holds what this code does not know, or would execute code.
    """
    latest = folder / "latest"
    tag = latest.read_text().strip() if latest.is_file() else ""
    if not tag or tag != Path(tag).name:
        raise BadInput(f"{folder}: no DeepSpeed checkpoint (no file `latest` with the name of a folder beside it)")
    files = {int(match[1]): path for path in (folder / tag).iterdir() if (match := _RANK_FILE.fullmatch(path.name))}
    try:
        with safe_unpickling():
            if not files:
                return _without_zero(_load(folder / tag / "mp_rank_00_model_states.pt"))
            if sorted(files) != list(range(world_size)):
                raise BadInput(f"{folder}: optimizer states of ranks {sorted(files)}, of {world_size} ranks expected")
            ranks = [_load(files[rank])["optimizer_state_dict"] for rank in range(world_size)]
            stage3 = "fp32_flat_groups" in ranks[0]
            model = _load(folder / tag / f"{'zero_pp_rank_0_' if stage3 else ''}mp_rank_00_model_states.pt")
            if model.get("frozen_param_shapes"):
                raise BadInput(f"{folder}: it has frozen parameters, which no model of this version has")
            merged = _merge_stage3(ranks, model) if stage3 else _merge_stage12(ranks, model)
            return SavedModel(list(merged), _buffers(model), dict(model["shared_params"]))
    except pickle.UnpicklingError as error:
        first = (str(error).strip().splitlines() or ["UnpicklingError"])[0]
        raise BadInput(f"{folder}: refused, a file would execute code when loaded ({first})") from error
    except FileNotFoundError as error:
        raise BadInput(f"{folder}: {error.filename} is missing") from error
    except (KeyError, IndexError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise BadInput(f"{folder}: not what DeepSpeed {_deepspeed_version()} writes ({problem})") from error


def _load(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))


def _deepspeed_version() -> str:
    import deepspeed

    return str(deepspeed.__version__)


def _buffers(model: dict[str, Any]) -> dict[str, Tensor]:
    return {name: model["module"][name] for name in model["buffer_names"]}


def _merge_stage12(ranks: list[dict[str, Any]], model: dict[str, Any]) -> Iterator[SavedParameter]:
    """ZeRO 1 and 2: the group's parameters end to end, cut into equal parts; a rank says where in its part each is."""
    for group, shapes in enumerate(model["param_shapes"]):
        for name, shape in shapes.items():
            parameter = SavedParameter(name, tuple(shape))
            for rank in ranks:
                where = rank["param_slice_mappings"][group].get(name)
                if where is not None:
                    state = rank["base_optimizer_state"]["state"].get(group, {})
                    flat = rank["single_partition_of_fp32_groups"][group]
                    _add(parameter, flat, state, where.start, where.numel)
            yield _checked(parameter)


def _merge_stage3(ranks: list[dict[str, Any]], model: dict[str, Any]) -> Iterator[SavedParameter]:
    """ZeRO 3: each parameter is cut into equal parts, one a rank; a rank has its parts of a group end to end."""
    for group, shapes in enumerate(model["param_shapes"]):
        start = 0
        for name, shape in shapes.items():
            parameter = SavedParameter(name, tuple(shape))
            size = -(-parameter.numel // len(ranks))
            for rank in ranks:
                state = rank["optimizer_state_dict"]["state"].get(group, {})
                _add(parameter, rank["fp32_flat_groups"][group], state, start, size)
            start += size
            yield _checked(parameter)


def _without_zero(model: dict[str, Any]) -> SavedModel:
    """ZeRO 0: torch's own optimizer, which numbers the parameters in the order of its groups."""
    if _NAMES not in model:
        raise BadInput("it was written under ZeRO 0 by a version that left the parameters' names out")
    states = model["optimizer"]["state"]
    parameters = []
    for number, name in enumerate(name for group in model[_NAMES] for name in group):
        value = model["module"][name]
        parameter = SavedParameter(name, tuple(value.shape))
        _add(parameter, value.reshape(-1), states.get(number, {}), 0, value.numel())
        parameters.append(_checked(parameter))
    return SavedModel(parameters, _buffers(model))


def _add(parameter: SavedParameter, flat: Tensor, state: dict[str, Any], start: int, size: int) -> None:
    """Add a rank's piece: `size` elements from `start` of its flat vectors."""
    parameter.pieces.setdefault("fp32", []).append(flat.narrow(0, start, size))
    for moment in MOMENTS:
        if moment in state:
            parameter.pieces.setdefault(moment, []).append(state[moment].reshape(-1).narrow(0, start, size))
    if "step" in state:
        parameter.steps = float(state["step"])


def _checked(parameter: SavedParameter) -> SavedParameter:
    for kind, pieces in parameter.pieces.items():
        there = sum(piece.numel() for piece in pieces)
        if there < parameter.numel:
            raise BadInput(f"{kind} of {parameter.name} has {there} of {parameter.numel} elements in the ranks' files")
    if "fp32" not in parameter.pieces:
        raise BadInput(f"no rank's file holds {parameter.name}")
    return parameter
