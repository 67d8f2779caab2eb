"""Every setting of a run, typed, documented and validated, and the one function that reads them from YAML.

`load_config(path, overrides)` is the only way in. What the fields mean stands in their `description`, which
`triptych config` prints.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from data_pipelines.config import DataConfig, Fraction, PositiveInt, Settings
from pretrain.config_file import dump_settings, load_settings
from pretrain.slurm_config import SlurmConfig

PRESETS = ("tiny", "base", "large")


class RunConfig(Settings):
    """Where a run lives and what it is called."""

    dir: str = Field(description="Run directory: everything that the run writes is under it.")
    name: str = Field("triptych", description="Name for logs, reports and the model card.")
    seed: int = Field(0, ge=0, description="Seed of the weights, the order, augmentation and masks.")
    stop_before: str | None = Field(
        None, description="Save and stop this long before the end of the job (SLURM_JOB_END_TIME), for example `5m`."
    )


class ModelConfig(Settings):
    """The network. A preset fixes every size; `vision`, `audio` and `text` override single fields of it."""

    preset: Literal["tiny", "base", "large"] = Field("tiny", description="Sizes: tiny 1.6 M, base 280 M, large 1.6 B.")
    family: Literal["gemma4"] = Field("gemma4", description="Native transformers family of the backbone.")
    init_from: str | None = Field(None, description="Local checkpoint folder of the same family to start from.")
    text: dict[str, Any] = Field(default_factory=dict, description="Fields of the family's text config to override.")
    vision: dict[str, Any] = Field(default_factory=dict, description="Fields of the vision config to override.")
    audio: dict[str, Any] = Field(default_factory=dict, description="Fields of the audio config to override.")
    embedding_size: PositiveInt | None = Field(
        None, description="Size of the joint embedding; null takes the preset's."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="Attention of text and vision layers.")


class LossesConfig(Settings):
    """Weights of the losses; 0 switches one off."""

    text: float = Field(1.0, ge=0, description="Next token of the caption or transcript.")
    image: float = Field(0.0, ge=0, description="Masked patches.")
    audio: float = Field(0.0, ge=0, description="Masked log-mel frames.")
    action: float = Field(0.0, ge=0, description="Actions (a later modality; nothing produces it yet).")
    align: float = Field(1.0, ge=0, description="Contrastive alignment of the modality pairs.")


class ObjectivesConfig(Settings):
    """How each loss is built."""

    align: Literal["infonce", "siglip"] = Field("infonce", description="Contrastive loss.")
    logit_scale: float = Field(
        14.285714, gt=0, le=100, description="Initial scale of the similarities (1 / temperature)."
    )
    label_smoothing: Fraction = Field(0.0, description="Smoothing of the InfoNCE targets against false negatives.")
    image_mask_chance: Fraction = Field(0.5, description="Share of the images that are masked at all.")
    image_mask_share: Fraction = Field(0.5, description="Share of the patches masked in such an image.")
    audio_mask_chance: Fraction = Field(0.5, description="Share of the sounds that are masked at all.")
    audio_mask_share: Fraction = Field(0.3, description="Share of the frames masked in such a sound.")
    drop_image: Fraction = Field(0.2, description="Modality dropout: chance that a caption does not see its image.")
    drop_audio: Fraction = Field(0.2, description="Modality dropout: chance that a caption does not see its sound.")


class TrainConfig(Settings):
    """The optimizer and its schedule."""

    max_steps: PositiveInt = Field(1000, description="Optimizer steps of the whole run.")
    warmup_steps: int = Field(
        100, ge=0, description="Steps of linear warm-up. Alignment stays at ln(batch) without it."
    )
    schedule: Literal["cosine", "wsd", "constant"] = Field("cosine", description="Shape after the warm-up.")
    decay_share: Fraction = Field(0.2, description="wsd: share of the run that the final decay takes.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    min_learning_rate_share: Fraction = Field(0.0, description="Final learning rate as a share of the peak.")
    learning_rate_scale: dict[Literal["text", "vision", "audio", "heads"], float] = Field(
        default_factory=dict, description="Factor on the learning rate of a part."
    )
    weight_decay: float = Field(0.05, ge=0, description="AdamW decay; none on norms, biases and scalars.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW beta 1.")
    beta2: float = Field(0.98, ge=0, lt=1, description="AdamW beta 2.")
    epsilon: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    clip_grad_norm: float = Field(1.0, ge=0, description="Largest norm of the whole gradient; 0 does not clip.")


class EngineConfig(Settings):
    """DeepSpeed. The DeepSpeed config is derived from this, with numbers."""

    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="ZeRO stage.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Compute type; the optimizer state stays fp32.")
    offload_optimizer: bool = Field(False, description="Keep the optimizer state in host memory (ZeRO 1 to 3).")
    offload_parameters: bool = Field(False, description="Keep the parameters in host memory (ZeRO 3).")
    bucket_mb: PositiveInt = Field(200, description="Size of a communication bucket in MB.")
    collective_timeout_seconds: PositiveInt = Field(
        1800,
        description="A collective that takes longer ends the run. Above supervisor.hang_seconds, which names the rank.",
    )


class CheckpointConfig(Settings):
    """When to save and how many to keep. Every run saves at its end too."""

    every_steps: PositiveInt = Field(1000, description="Steps between two checkpoints.")
    keep_last: PositiveInt = Field(2, description="Newest checkpoints that stay.")
    keep_every: PositiveInt | None = Field(
        None, description="Checkpoints of steps that are multiples of this stay for ever; null keeps none."
    )
    on_failure: Literal["continue", "stop"] = Field(
        "continue",
        description="When one cannot be written (a full disk): `continue` trains on and tries again at the next, "
        "`stop` ends the run with status 1. The last one of a run must succeed.",
    )


class EvalConfig(Settings):
    """Evaluation during the run and after it."""

    every_steps: int = Field(0, ge=0, description="Steps between two evaluations; 0 evaluates at the end only.")
    batch: PositiveInt = Field(128, description="Samples a forward pass.")
    max_samples: PositiveInt | None = Field(None, description="Evaluate on this many samples at most.")
    image_prompts: list[str] = Field(
        default_factory=lambda: ["a picture of {}"], description="Class prompts for images; {} is the class name."
    )
    audio_prompts: list[str] = Field(
        default_factory=lambda: ["the sound of {}"], description="Class prompts for sounds; {} is the class name."
    )


class LoggingConfig(Settings):
    """What is shown and how often."""

    every_steps: PositiveInt = Field(10, description="Steps between two lines on a plain terminal.")
    tensorboard: bool = Field(True, description="Write TensorBoard files under the run directory.")


class WatchConfig(Settings):
    """Numbers that go wrong: a loss or gradient that is not finite is never let into the weights."""

    max_non_finite: PositiveInt = Field(
        10, description="Steps in a row that are skipped for a loss or gradient that is not finite; then the run stops."
    )
    policy: Literal["log", "skip", "roll_back"] = Field(
        "log",
        description="A spike of the loss or of the gradient's norm: log trains the step and says so; skip does not let "
        "it into the weights; roll_back goes back to the last checkpoint and passes over the guilty batches.",
    )
    window: int = Field(
        128, ge=4, description="Trained steps that a spike is measured against; half of them must be there first."
    )
    threshold: float = Field(
        10.0, gt=0, description="A spike lies this many robust deviations (1.4826 MAD) above their median."
    )
    pass_over_around: int = Field(
        1, ge=0, description="roll_back: batches passed over on each side of the spike's; its cause may lie before."
    )
    max_spikes: PositiveInt = Field(
        10, description="Steps in a row that are refused as spikes; then the run stops: they are no spikes any more."
    )
    max_roll_backs: int = Field(10, ge=0, description="Roll-backs of the whole run; at the next one it stops.")


class SupervisorConfig(Settings):
    """The process that watches the ranks, ends them when they hang, and starts them again where asked."""

    hang_seconds: PositiveInt = Field(
        600, description="Ranks without a sign of life for this long hang, and are ended."
    )
    start_seconds: PositiveInt = Field(
        1800, description="The same before the first step, while they import, build datasets and verify checkpoints."
    )
    max_restarts: int = Field(0, ge=0, description="Starts after a fault, a dead rank or a hang.")
    backoff_seconds: float = Field(
        10.0, ge=0, description="Wait before the first of them; doubles each time, up to 10 minutes."
    )
    owner_seconds: float = Field(
        60.0,
        gt=0,
        description="A run on another host that shows no sign of life for this long loses its run directory.",
    )


class Config(Settings):
    """The whole run."""

    run: RunConfig = Field(description="Where the run lives.")
    data: DataConfig = Field(description="Datasets, batches, decoding.")
    model: ModelConfig = Field(default_factory=ModelConfig, description="The network.")
    losses: LossesConfig = Field(default_factory=LossesConfig, description="Weights of the losses.")
    objectives: ObjectivesConfig = Field(default_factory=ObjectivesConfig, description="How each loss is built.")
    train: TrainConfig = Field(default_factory=TrainConfig, description="Optimizer and schedule.")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="DeepSpeed.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Checkpoints.")
    evaluation: EvalConfig = Field(default_factory=EvalConfig, description="Evaluation.")
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="Logs.")
    watch: WatchConfig = Field(default_factory=WatchConfig, description="Numbers that go wrong.")
    supervisor: SupervisorConfig = Field(default_factory=SupervisorConfig, description="Supervisor.")
    slurm: SlurmConfig = Field(default_factory=SlurmConfig, description="Slurm.")

    @model_validator(mode="after")
    def _possible(self) -> Config:
        if not self.run.dir.strip():
            raise ValueError("run.dir is empty; it needs a folder for everything that the run writes")
        if not self.data.train_sources:
            raise ValueError("data.train is an empty list; it needs at least one dataset folder")
        if self.losses.action > 0:
            raise ValueError("losses.action: no action data or head exists yet; set it to 0")
        if not any((self.losses.text, self.losses.image, self.losses.audio, self.losses.align)):
            raise ValueError("losses: every weight is 0, so there is nothing to train")
        if self.train.warmup_steps > self.train.max_steps:
            raise ValueError(
                f"train.warmup_steps {self.train.warmup_steps} is more than train.max_steps {self.train.max_steps}"
            )
        if self.engine.offload_parameters and self.engine.zero_stage != 3:
            raise ValueError("engine.offload_parameters needs engine.zero_stage 3")
        if self.engine.offload_optimizer and self.engine.zero_stage == 0:
            raise ValueError("engine.offload_optimizer needs engine.zero_stage 1, 2 or 3")
        if self.engine.precision == "bf16" and self.engine.zero_stage == 0:
            raise ValueError(
                "engine.precision bf16 needs engine.zero_stage 1, 2 or 3: under 0 nothing keeps fp32 weights"
            )
        if self.data.micro_batch is not None and self.data.global_batch % self.data.micro_batch:
            raise ValueError(
                f"data.global_batch {self.data.global_batch} is not a multiple of "
                f"data.micro_batch {self.data.micro_batch}"
            )
        return self


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read one run's YAML file, apply overrides such as `train.max_steps=20`, and check all of it.

    Relative paths in it are relative to the current directory. Raises `BadInput`, in one line, for whatever is wrong.
    """
    return load_settings(Config, path, overrides)


def dump_config(config: Config) -> str:
    """YAML text of every setting, defaults included, that `load_config` reads back as an equal `Config`."""
    return dump_settings(config)
