"""What may change between a run and its resume: every setting is free, allowed on request, or fatal.

Free: nothing that is trained depends on it but rounding. Allowed with `--allow-change FIELD`: the run goes on with the
same weights and the same order of samples, but what it learns becomes another; run.json records it. Fatal: the
checkpoint does not fit, the order would repeat or lose samples, or the setting is read at the start of a run only.
`data.train` and its mixture are judged by what the datasets hold (`SampleSequence.resume`), so that folders may move.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import ValidationError

from data_pipelines.config import Settings
from data_pipelines.errors import BadInput

Kind = Literal["free", "mixture", "allowed", "fatal"]

MIXTURE = "data.train"
"""What `--allow-change` alone allows."""

_SETTINGS: dict[Kind, str] = {
    "free": """
        run.dir run.name run.stop_before
        data.eval data.build data.micro_batch data.num_workers data.worker_type data.prefetch data.max_bad_rate
        data.max_bad_run data.remote.mode data.remote.cache_dir data.remote.max_cache_gb data.remote.ahead_steps
        data.remote.downloads data.remote.retries data.remote.retry_seconds data.remote.timeout_seconds
        data.remote.allow_private_addresses
        model.gradient_checkpointing
        engine.zero_stage engine.offload_optimizer engine.offload_parameters engine.bucket_mb
        engine.collective_timeout_seconds
        checkpoint.every_steps checkpoint.keep_last checkpoint.keep_every checkpoint.on_failure
        evaluation.every_steps evaluation.batch evaluation.max_samples evaluation.image_prompts evaluation.audio_prompts
        logging.every_steps logging.tensorboard
        watch.max_non_finite watch.max_spikes watch.max_roll_backs
        supervisor.hang_seconds supervisor.start_seconds supervisor.max_restarts supervisor.backoff_seconds
        supervisor.owner_seconds
        slurm.partition slurm.account slurm.qos slurm.constraint slurm.job_name slurm.time slurm.nodes slurm.min_nodes
        slurm.gpus_per_node slurm.cpus_per_task slurm.mem slurm.max_requeues slurm.signal_seconds
    """,
    "mixture": "data.train data.temperature",
    "allowed": """
        data.pack_tokens data.image.draft data.image.max_pixels data.audio.max_seconds data.audio.max_declared_seconds
        data.text.max_tokens data.text.max_bytes
        data.augment.image_shift data.augment.image_scale data.augment.image_rotate data.augment.image_crop
        data.augment.image_flip data.augment.image_noise data.augment.audio_speed data.augment.audio_shift_seconds
        data.augment.audio_gain_db data.augment.audio_noise data.augment.audio_tilt_db data.augment.audio_equalizer_db
        data.augment.mel_warp data.augment.mel_time_masks data.augment.mel_time_mask_share
        data.augment.mel_frequency_masks data.augment.mel_frequency_mask_share
        model.attention
        losses.text losses.image losses.audio losses.action losses.align
        objectives.align objectives.label_smoothing objectives.image_mask_chance objectives.image_mask_share
        objectives.audio_mask_chance objectives.audio_mask_share objectives.drop_image objectives.drop_audio
        train.max_steps train.warmup_steps train.schedule train.decay_share train.learning_rate
        train.min_learning_rate_share train.learning_rate_scale train.weight_decay train.beta1 train.beta2 train.epsilon
        train.clip_grad_norm
        engine.precision
        watch.policy watch.window watch.threshold watch.pass_over_around
    """,
    "fatal": """
        run.seed
        data.global_batch data.num_streams data.shuffle_block data.tail
        data.image.size data.image.patch_size data.image.pooling data.image.max_soft_tokens
        data.audio.sampling_rate data.audio.mel_bins data.audio.frame_ms data.audio.hop_ms data.audio.min_frequency
        data.audio.max_frequency data.audio.mel_mean data.audio.mel_std
        data.text.tokenizer data.text.vocab_size
        model.preset model.family model.init_from model.text model.vision model.audio model.embedding_size
        objectives.logit_scale
    """,
}
KINDS: dict[str, Kind] = {field: kind for kind, fields in _SETTINGS.items() for field in fields.split()}
"""Kind of every setting of a run; a test holds it against the schema, so that a new one is put here on purpose."""


@dataclass(frozen=True)
class Difference:
    """One setting that a resume has otherwise than its checkpoint; values as in JSON."""

    field: str
    old: Any
    new: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.field}: {_short(self.old)} -> {_short(self.new)}"

    def record(self, step: int) -> dict[str, Any]:
        """An entry of run.json's `changes`."""
        return {"step": step, **asdict(self)}


def differences(old: dict[str, Any], new: Settings) -> list[Difference]:
    """All settings that differ between a checkpoint's config and this one, in the schema's order.

    A setting that an older version did not know counts as its default. One that this version does not know any more
    is free: it is shown, and nobody could put it back.
    """
    old, gone = _of_this_version(old, type(new))
    after = new.model_dump(mode="json")
    moved = _shares(old) == _shares(after)
    found = [
        Difference(field, before, now, "free" if field == MIXTURE and moved else _kind(field))
        for field, before, now in _walk(old, after, "")
    ]
    return found + [Difference(field, value, None, "free") for field, value in gone.items()]


def check_fields(fields: Sequence[str]) -> None:
    """Refuse a FIELD of `--allow-change` that is no setting or section, or that may not change in any case.

    Raises:
        BadInput: naming the nearest one.
    """
    sections = {field.rsplit(".", depth)[0] for field in KINDS for depth in range(1, field.count(".") + 1)}
    for field in fields:
        kinds = {kind for name, kind in KINDS.items() if covers([field], name)}
        if not kinds:
            near = difflib.get_close_matches(field, [*KINDS, *sorted(sections)], n=1)
            raise BadInput(f"--allow-change {field}: no such setting" + (f"; did you mean {near[0]}?" if near else ""))
        if kinds == {"fatal"}:
            raise BadInput(f"--allow-change {field}: a checkpoint cannot go on with another {field}; use a new run.dir")


def covers(fields: Sequence[str], field: str) -> bool:
    """Whether one of the allowed settings or sections is `field` or holds it."""
    return any(field == allowed or field.startswith(f"{allowed}.") for allowed in fields)


def refusal(found: Sequence[Difference], fields: Sequence[str], checkpoint: str) -> str | None:
    """Why these differences keep a run from going on from `checkpoint`, in at most five lines; None if they do not."""
    fatal = [each for each in found if each.kind == "fatal"]
    asking = [each for each in found if each.kind == "allowed" and not covers(fields, each.field)]
    if not fatal and not asking:
        return None
    others = [each for each in found if each not in fatal and each not in asking]
    lines = [f"{checkpoint} was made with another config, and not all of these may change on resume:"]
    for title, group in (("never", fatal), ("only with --allow-change", asking), ("freely", others)):
        if group:
            lines.append(f"  {title}: " + "; ".join(map(str, group)))
    allow = "" if fatal else " " + " ".join(f"--allow-change {each.field}" for each in asking) + ","
    lines.append(f"put them back, {'go on with' + allow + ' ' if allow else ''}or use another run.dir")
    return "\n".join(lines)


def spell_out(arguments: Sequence[str]) -> list[str]:
    """Command line arguments with `--allow-change`, where no FIELD follows, as `--allow-change=data.train`."""
    out: list[str] = []
    for place, argument in enumerate(arguments):
        following = arguments[place + 1 : place + 2]
        bare = argument == "--allow-change" and (not following or not _may_be_field(following[0]))
        out.append(f"{argument}={MIXTURE}" if bare else argument)
    return out


def _may_be_field(word: str) -> bool:
    return not word.startswith("-") and "/" not in word and not word.endswith((".yaml", ".yml"))


def _kind(field: str) -> Kind:
    name = field
    while name not in KINDS and "." in name:
        name = name.rsplit(".", 1)[0]
    return KINDS.get(name, "fatal")


def _walk(before: Any, after: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*after, *(key for key in before if key not in after)]:
            yield from _walk(before.get(key), after.get(key), f"{path}.{key}".lstrip("."))
    elif before != after:
        yield path, before, after


def _of_this_version(old: dict[str, Any], schema: type[Settings]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A config with this version's defaults filled in, and the settings in it that this version does not know."""
    old, gone = json.loads(json.dumps(old)), {}
    try:
        schema.model_validate_json(json.dumps(old))
    except ValidationError as error:
        for wrong in error.errors(include_url=False):
            *sections, last = wrong["loc"]
            node: Any = old
            for key in sections:
                node = node.get(key) if isinstance(node, dict) else None
            if wrong["type"] == "extra_forbidden" and isinstance(node, dict):
                gone[".".join(map(str, wrong["loc"]))] = node.pop(last)
    try:
        return schema.model_validate_json(json.dumps(old)).model_dump(mode="json"), gone
    except ValidationError:
        # Its values are another version's too: those that differ are named as they are.
        return old, gone


def _shares(config: dict[str, Any]) -> list[Any]:
    """What the training datasets are taken by, without their folders."""
    train = config.get("data", {}).get("train")
    sources = train if isinstance(train, list) else [{}]
    return [[source.get("weight"), source.get("epochs")] for source in sources]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
