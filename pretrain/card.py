"""The model card of an export: what it is, what it was trained on, how, how well it does, and programs that run.

Everything in it is read from the run: nothing is claimed that was not counted or measured. The metadata block is
written by huggingface_hub, so the Hub reads it back.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_pipelines.config import RemoteConfig
from data_pipelines.dataset import open_dataset
from data_pipelines.errors import BadInput
from pretrain.config import Config
from pretrain.processors import prompts
from pretrain.provenance import Provenance, count, licences
from pretrain.restore import Restored
from pretrain.results import blocks

TEMPLATE = "card_template.md"


def write_card(
    folder: Path, run_dir: Path, restored: Restored, results: dict[str, Any] | None, dtype: str, license: str
) -> None:
    """Write `README.md`.

    Args:
        folder: the export.
        run_dir: the run; its `run.json` and `metrics.jsonl` say how the training went.
        restored: the exported model.
        results: evaluation of this step; None where there is none.
        dtype: type of the exported weights.
        license: the Hub's identifier of the weights' licence.
    """
    config, tokenizer, model = restored.config, restored.tokenizer, restored.model
    trained = [_open(source.path, config.data.remote, "training") for source in config.data.train_sources]
    evaluated = [_open(source.path, config.data.remote, "evaluation") for source in config.data.eval_sources]
    sources = [found for found, _, _ in trained + evaluated if found is not None]
    training = [found for found, _, _ in trained if found is not None]
    layout = prompts(tokenizer)
    open_image, close_image = layout["image"].split("{image}")
    open_audio, close_audio = layout["audio"].split("{audio}")
    has_image = not training or any(source.image for source in training)
    has_audio = not training or any(source.audio for source in training)
    kinds = [name for name, there in (("images", has_image), ("sounds", has_audio), ("text", True)) if there]
    run = _read_json(run_dir / "run.json")
    licence_counts: dict[str, int] = {}
    for _, counts, _ in trained:
        for name, number in counts.items():
            licence_counts[name] = licence_counts.get(name, 0) + number
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    text = environment.get_template(TEMPLATE).render(
        metadata=metadata(config, results, sources, license, has_image, has_audio).to_yaml(),
        name=config.run.name,
        modalities=f"{', '.join(kinds[:-1])} and {kinds[-1]}".capitalize(),
        class_name=type(model.backbone).__name__,
        parameters=_parameters(model),
        origin="pretrained from scratch" if config.model.init_from is None else "pretrained further",
        version=_one(run.get("versions", {}).get("triptych", ""), "not installed", ""),
        needed=f"torch, transformers {transformers.__version__} or a later 5.x, Pillow and soundfile",
        has_image=has_image,
        has_audio=has_audio,
        image_size=config.data.image.size,
        image_token=tokenizer.image_token,
        audio_token=tokenizer.audio_token,
        eos_token=tokenizer.eos_token,
        prompt_open_image=open_image,
        prompt_close_image=close_image,
        prompt_open_audio=open_audio,
        prompt_close_audio=close_audio,
        prompts=layout,
        max_new_tokens=min(config.data.text.max_tokens, 64),
        max_seconds=config.data.audio.max_seconds,
        max_samples=int(config.data.audio.max_seconds * config.data.audio.sampling_rate),
        sampling_rate=config.data.audio.sampling_rate,
        data={
            "train": {
                "num_samples_text": f"{sum(source.num_samples for source in training):,}" if training else "its",
                "names": ", ".join(source.name for source in training) or "see below",
            },
            "sources": sources,
            "missing": [path for found, _, path in trained + evaluated if found is None],
            "licences": licence_counts,
        },
        training=_training(config, run_dir, run, restored.step, dtype),
        evaluation=blocks(results) if results else [],
        evaluation_data=results.get("data", {}).get("name", "") if results else "",
        evaluation_samples=results["num_samples"] if results else 0,
        step=restored.step,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def metadata(
    config: Config,
    results: dict[str, Any] | None,
    sources: list[Provenance],
    license: str,
    has_image: bool,
    has_audio: bool,
) -> ModelCardData:
    """The card's metadata block, with the evaluation as a model index."""
    both = {"pipeline_tag": "any-to-any"} if has_image and has_audio else {}
    single = {"pipeline_tag": "image-text-to-text"} if has_image else {"pipeline_tag": "audio-text-to-text"}
    named = {"license_name": "see-training-data", "license_link": "README.md"} if license == "other" else {}
    return ModelCardData(
        license=license,
        library_name="transformers",
        tags=["triptych", "multimodal", "pretraining", "image-text", "audio-text"],
        datasets=sorted({_slug(source.name) for source in sources if source.role == "training"}),
        model_name=config.run.name,
        eval_results=_eval_results(results) or None,
        **(both or single),
        **named,
    )


def _eval_results(results: dict[str, Any] | None) -> list[EvalResult]:
    if results is None:
        return []
    data = str(results.get("data", {}).get("name", "evaluation"))
    zero_shot, retrieval = results["zero_shot"], results["retrieval"]
    wanted = [
        ("zero-shot-image-classification", "accuracy", "top-1", zero_shot["image_top1"]),
        ("audio-classification", "accuracy", "zero-shot top-1", zero_shot["audio_top1"]),
        ("feature-extraction", "precision", "image to sound, class P@1", retrieval["image_to_audio_class_p1"]),
        ("image-to-text", "loss", "caption loss, nats a token", results["caption"]["loss"]),
    ]
    return [
        EvalResult(
            task_type=task,
            dataset_type=_slug(data),
            dataset_name=data,
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for task, metric, name, value in wanted
        if value is not None
    ]


def _training(config: Config, run_dir: Path, run: dict[str, Any], step: int | None, dtype: str) -> dict[str, Any]:
    train, losses = config.train, config.losses
    weights = {name: value for name, value in losses.model_dump().items() if value}
    starts = run.get("starts", [{}])
    versions = run.get("versions", {})
    seconds = _seconds(run_dir / "metrics.jsonl", step)
    worlds = " then ".join(str(world) for world in dict.fromkeys(run.get("world_sizes", []))) or "unknown"
    return {
        "steps": f"{step} of {train.max_steps}, {config.data.global_batch} samples each",
        "losses": ", ".join(f"{name} {value:g}" for name, value in weights.items()),
        "alignment": config.objectives.align,
        "optimizer": f"AdamW, peak learning rate {train.learning_rate:g}, {train.warmup_steps} steps of warm-up, "
        f"{train.schedule}, weight decay {train.weight_decay:g}",
        "precision": f"{config.engine.precision}, exported as {dtype}",
        "parallelism": f"DeepSpeed ZeRO {config.engine.zero_stage}, {worlds} process(es)",
        "device": starts[-1].get("device", "not recorded"),
        "time in steps": "not recorded" if seconds is None else f"{seconds / 60:.1f} minutes",
        "seed": config.run.seed,
        "versions": ", ".join(f"{name} {found}" for name, found in versions.items()) or "not recorded",
    }


def _seconds(metrics: Path, step: int | None) -> float | None:
    """Time spent in the steps behind a checkpoint; a step that was done twice counts once, as it was done last."""
    spent: dict[int, float] = {}
    try:
        with metrics.open(encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                spent[int(record["step"])] = float(record["step_seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sum(seconds for at, seconds in spent.items() if step is None or at <= step)


def _parameters(model: Any) -> dict[str, str]:
    counts = {"text": 0, "vision": 0, "audio": 0}
    for name, parameter in model.backbone.named_parameters():
        counts[model.family.part(name)] += parameter.numel()
    counts["total"] = sum(counts.values())
    return {name: _millions(number) for name, number in counts.items()}


def _millions(number: int) -> str:
    return (
        f"{number / 1e6:.2f} M"
        if number < 1e8
        else f"{number / 1e6:.0f} M"
        if number < 1e9
        else f"{number / 1e9:.2f} B"
    )


def _open(path: str, remote: RemoteConfig, role: str) -> tuple[Provenance | None, dict[str, int], str]:
    try:
        dataset = open_dataset(path, remote)
        return count(dataset, role), licences(dataset) if role == "training" else {}, path
    except BadInput:
        return None, {}, f"{Path(path).name} ({role})"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _one(value: str, unwanted: str, instead: str) -> str:
    return instead if value == unwanted else value


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "dataset"
