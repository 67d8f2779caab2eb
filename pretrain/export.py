"""From a run's checkpoint to a folder that plain transformers loads.

The weights go from the ranks' shards to safetensors a tensor at a time, under the names and in the shards that
transformers' own `save_pretrained` would use; config, tokenizer and processors are written by transformers itself. The
folder appears under its name only when it is whole and, unless told otherwise, verified.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from data_pipelines.atomic import fsync_folder
from data_pipelines.dataset import Dataset, open_dataset
from data_pipelines.errors import BadInput
from pretrain.card import write_card
from pretrain.config import Config
from pretrain.consolidate import Weights, open_weights
from pretrain.folders import HEADS_FOLDER, REFERENCE, RESULTS, TRAINING_CONFIG, check_free
from pretrain.processors import save_processors
from pretrain.reference import record
from pretrain.restore import Restored, find_checkpoint, restore_run
from pretrain.verify import Verification, verify_export, write_manifest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_SHARD_BYTES = 2_000_000_000
BACKBONE, HEADS = "backbone.", "heads."


def export(
    run_dir: Path,
    out: Path,
    step: int | None = None,
    dtype: str = "fp32",
    license: str = "other",
    check: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Verification | None:
    """Write the model of a run to `out`.

    Args:
        run_dir: a run directory with a valid checkpoint.
        out: folder to make; it may exist only if it is empty.
        step: the checkpoint's step; None takes the newest valid one.
        dtype: type of the exported weights, `fp32` or `bf16`.
        license: the Hub's identifier of the weights' licence, for the card.
        check: verify the folder before it gets its name.
        say: gets a line about what is being done.

    Returns:
        What verification found; None without `check`.

    Raises:
        BadInput: no run, no valid checkpoint, or `out` is taken.
        RuntimeError: the export does not answer as the run's weights do. Nothing is left at `out`.
    """
    if dtype not in DTYPES:
        raise BadInput(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    check_free(out)
    found, passed = find_checkpoint(run_dir, step)
    for bad in passed:
        say(f"passed over {bad.path}: {bad.reason}")
    say(f"exporting {found.path} as {dtype}")
    restored = restore_run(run_dir, found)
    dataset = open_evaluation_data(restored.config, say)
    work = out.parent / f".tmp-{out.name}.{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        weights = open_weights(found.path)
        num_shards = write_backbone(restored.model.backbone, weights.with_prefix(BACKBONE), work, DTYPES[dtype])
        write_heads(restored, weights.with_prefix(HEADS), work)
        save_processors(restored.config.data, restored.tokenizer, work)
        shutil.copyfile(run_dir / "config.yaml", work / TRAINING_CONFIG)
        say(f"wrote {num_shards} weight file(s); measuring reference values")
        _write_json(work / REFERENCE, record(restored, dataset, work, dtype))
        results = copy_results(run_dir, work, restored.step)
        write_card(work, run_dir, restored, results, dtype, license)
        write_manifest(work)
        for folder in {path.parent for path in work.rglob("*")}:
            fsync_folder(folder)
        outcome = None
        if check:
            say("verifying in a fresh process, with transformers alone")
            outcome = verify_export(work, dataset)
            if not outcome.verified:
                raise RuntimeError(f"the export is wrong and was not kept: {'; '.join(outcome.problems[:3])}")
        check_free(out)
        if out.exists():
            out.rmdir()
        work.rename(out)
        fsync_folder(out.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return outcome


def write_backbone(backbone: PreTrainedModel, weights: Weights, folder: Path, dtype: torch.dtype) -> int:
    """Write `config.json`, `generation_config.json` and the weights, as `save_pretrained` would.

    Args:
        backbone: the native model; gives config, names and shapes. Its values are not read.
        weights: the values, under the backbone's own names.
        folder: gets the files.
        dtype: floating-point tensors are cast to it.

    Returns:
        Number of weight files.
    """
    tied = backbone.all_tied_weights_keys
    names = [name for name in backbone.state_dict() if name not in tied]
    missing = sorted(set(names) - set(weights))
    if missing:
        raise RuntimeError(f"the checkpoint lacks {len(missing)} tensors of the model, first {missing[0]}")
    num_shards = write_safetensors(weights, names, folder, dtype)
    config = backbone.config
    config.architectures = [type(backbone).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    generation = GenerationConfig.from_model_config(config)
    generation.save_pretrained(folder)
    return num_shards


def write_safetensors(weights: Weights, names: Sequence[str], folder: Path, dtype: torch.dtype) -> int:
    """Write `model.safetensors`, or numbered shards with an index; holds one shard in memory at a time.

    Args:
        weights: where to get the tensors.
        names: the tensors to write.
        folder: gets the files.
        dtype: floating-point tensors are cast to it.

    Returns:
        Number of files.
    """
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(weights.shape(name), dtype=dtype, device="meta") for name in names},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_BYTES,
    )
    for file, inside in plan.filename_to_tensors.items():
        shard = {name: _cast(weights[name], dtype) for name in inside}
        _save(shard, folder / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)
    return len(plan.filename_to_tensors)


def write_heads(restored: Restored, weights: Weights, folder: Path) -> None:
    """Write `pretrain_heads/`: what evaluation and further pretraining need, and loading the model does not."""
    heads = folder / HEADS_FOLDER
    heads.mkdir()
    _save({name: weights[name] for name in weights}, heads / "model.safetensors")
    about = {
        "format_version": 1,
        "step": restored.step,
        "embedding_size": restored.model.embedding_size,
        "alignment": restored.config.objectives.align,
        "triptych_version": installed_version(),
        "tensors": {name: list(weights.shape(name)) for name in weights},
    }
    _write_json(heads / "config.json", about)


def copy_results(run_dir: Path, folder: Path, step: int | None) -> dict[str, Any] | None:
    """Copy the run's evaluation of this very step to `eval/results.json`, if there is one, and return it."""
    candidates = [run_dir / "eval" / f"step-{step or 0:08d}.json", run_dir / "eval" / "results.json"]
    for file in candidates:
        try:
            results = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(results, dict) and results.get("step") == step:
            _write_json(folder / RESULTS, results)
            return results
    return None


def open_evaluation_data(config: Config, say: Callable[[str], None]) -> Dataset | None:
    """The run's evaluation data, or None, said, where there is none any more."""
    if not config.data.eval_sources:
        return None
    try:
        return open_dataset(config.data.eval_sources[0].path, config.data.remote)
    except BadInput as error:
        say(f"no reference values of the evaluation data: {error}")
        return None


def installed_version() -> str:
    """Version of the installed package, `unknown` where it runs from a checkout."""
    try:
        return version("triptych")
    except PackageNotFoundError:
        return "unknown"


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # A view into a rank's flat buffer would drag the whole buffer along; safetensors wants memory of its own.
    return tensor.to(dtype).clone() if tensor.is_floating_point() else tensor.clone()


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    # safetensors makes its files readable by the owner alone; on a cluster others are to load them too.
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)
    with path.open("rb") as file:
        os.fsync(file.fileno())
