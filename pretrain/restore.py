"""A trained model in one process: from a run's checkpoint, of any ZeRO stage and world size, or from an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar

from data_pipelines.errors import BadInput
from data_pipelines.tokenizer import load_folder
from pretrain.checkpoint import Found, find_latest, folder_of, verify
from pretrain.config import Config, load_config
from pretrain.consolidate import Weights, open_weights
from pretrain.folders import HEADS_FOLDER, TRAINING_CONFIG, check_run, exported_step, is_export
from pretrain.model import backbones
from pretrain.model.omni import OmniPretrainer, make_heads, special_tokens


@dataclass(frozen=True)
class Restored:
    """A model with everything that it was trained with."""

    model: OmniPretrainer
    config: Config
    tokenizer: Any
    step: int | None
    """Optimizer steps behind the weights; None where an export does not say."""
    source: Path
    """The checkpoint, or the export, that the weights are from."""


def find_checkpoint(run_dir: Path, step: int | None = None) -> tuple[Found, list[Found]]:
    """A run's newest valid checkpoint, or that of `step`, verified; and the newer invalid ones that were passed over.

    Raises:
        BadInput: the folder is no run, has no valid checkpoint, or that step's is missing or invalid.
    """
    check_run(run_dir)
    if step is not None:
        path = folder_of(run_dir, step)
        if not path.is_dir():
            there = sorted(folder.name for folder in (run_dir / "checkpoints").glob("step-*"))
            raise BadInput(f"{path}: no such checkpoint; there are {', '.join(there) or 'none'}")
        reason = verify(path)
        if reason is not None:
            raise BadInput(f"{path}: not a valid checkpoint ({reason}); choose another step")
        return Found(step, path, None), []
    newest, passed = find_latest(run_dir)
    if newest is None:
        reasons = f" ({passed[0].path.name}: {passed[0].reason})" if passed else ""
        raise BadInput(f"{run_dir}: no valid checkpoint{reasons}; let the run save one first")
    return newest, passed


def restore_run(run_dir: Path, checkpoint: Found) -> Restored:
    """The model of a run at a verified checkpoint; fp32, on the CPU, in evaluation mode.

    Raises:
        BadInput: the tokenizer or `model.init_from` is gone, or a file of the checkpoint would execute code.
    """
    config = load_config(run_dir / "config.yaml")
    if not (run_dir / "tokenizer").is_dir():
        raise BadInput(f"{run_dir / 'tokenizer'}: the run's tokenizer is missing")
    start = config.model.init_from
    if start is not None and not Path(start).is_dir():
        raise BadInput(
            f"{run_dir}: its model.init_from {start} is gone, and the model's sizes are those of that folder"
        )
    tokenizer = load_folder(run_dir / "tokenizer")
    model = OmniPretrainer.build(config, tokenizer)
    fill(model, open_weights(checkpoint.path))
    return Restored(model.eval(), config, tokenizer, checkpoint.step, checkpoint.path)


def restore_export(folder: Path) -> Restored:
    """The model of an export with its pretraining heads; fp32, on the CPU, in evaluation mode.

    Raises:
        BadInput: the folder is not a complete export of ours.
    """
    if not is_export(folder):
        raise BadInput(f"{folder}: not an export (no config.json with {TRAINING_CONFIG} beside it)")
    heads_file = folder / HEADS_FOLDER / "model.safetensors"
    if not heads_file.is_file():
        raise BadInput(f"{heads_file}: missing, and evaluation needs the pretraining heads")
    config = load_config(folder / TRAINING_CONFIG)
    tokenizer = load_folder(folder)
    disable_progress_bar()
    backbone = backbones.family(config.model.family).from_pretrained(str(folder), config.model.attention)
    heads = make_heads(config, backbone.config)
    heads.load_state_dict({name: tensor.float() for name, tensor in load_file(heads_file).items()})
    model = OmniPretrainer(backbone, heads, config, special_tokens(tokenizer))
    return Restored(model.eval(), config, tokenizer, exported_step(folder), folder)


@torch.no_grad()
def fill(model: torch.nn.Module, weights: Weights) -> None:
    """Copy weights into a model tensor by tensor; every name of the one must be a name of the other."""
    state = model.state_dict()
    missing, extra = sorted(set(state) - set(weights)), sorted(set(weights) - set(state))
    if missing or extra:
        raise RuntimeError(f"weights do not fit the model: {len(missing)} missing {missing[:3]}, extra {extra[:3]}")
    for name, tensor in state.items():
        if weights.shape(name) != tensor.shape:
            raise RuntimeError(f"{name} is {tuple(weights.shape(name))} in the weights and {tuple(tensor.shape)} here")
        tensor.copy_(weights[name])
