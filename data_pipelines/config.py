"""Settings of the data path: where samples come from, in which order, and how they become arrays.

These classes live beside the code that they configure; `pretrain.config` composes them into the one YAML file of a run.
Sizes are in the unit of their name. Image geometry is fixed here and read by the model, so that loader, model and
exported processor cannot disagree.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Settings(BaseModel):
    """Base of every settings class: strict types, no unknown keys, checked again on assignment."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True)


class SourceConfig(Settings):
    """One dataset folder in a mixture."""

    path: str = Field(description="Dataset folder (the one that holds dataset.json), or its URL.")
    weight: float | None = Field(None, gt=0, description="Share of the mixture, relative to others; null is 1.")
    epochs: float | None = Field(None, gt=0, description="Or how often it is gone through, relative to others.")


class PrepareConfig(Settings):
    """What a build leaves out, cleans and writes anew. Everything is off by default: members keep their own bytes."""

    require: list[Literal["image", "text", "audio"]] = Field(
        default_factory=list, description="Leave out rows that lack one of these."
    )
    keep: dict[str, list[str]] = Field(
        default_factory=dict,
        description="Metadata field and the values to keep, for example {language: [en, de]}; other rows go.",
    )
    min_image_side: PositiveInt | None = Field(
        None, description="Leave out rows whose image is shorter than this on one side, in pixels."
    )
    max_seconds: float | None = Field(None, gt=0, description="Leave out rows with a longer sound.")
    clean_text: bool = Field(
        False, description="Texts in Unicode NFC, on one line, without control characters or double spaces."
    )
    strip_html: bool = Field(False, description="Take HTML tags and entities out of texts first; implies clean_text.")
    dedup: list[str] = Field(
        default_factory=list,
        description="Leave out rows whose member came before, byte for byte: `image`, `audio`, `text`, or some of them "
        "together, such as `image+text`.",
    )
    dedup_images: int | None = Field(
        None,
        ge=0,
        le=16,
        description="Leave out rows whose image looks like one before: at most this many of the 64 bits of its "
        "perceptual hash differ.",
    )
    audio_rate: int | None = Field(
        None, ge=1000, le=655_350, description="Write sounds as mono FLAC of this many samples a second."
    )
    image_side: PositiveInt | None = Field(
        None, description="Scale images down to this many pixels on the longer side."
    )
    image_format: Literal["jpeg", "png", "webp"] | None = Field(
        None, description="Write all images in this format; null keeps their own."
    )

    @field_validator("dedup")
    @classmethod
    def _are_members(cls, names: list[str]) -> list[str]:
        for name in names:
            members = name.split("+")
            if len(set(members)) != len(members) or not set(members) <= {"image", "text", "audio"}:
                raise ValueError(f"{name!r}: give image, text, audio, or some of them joined by '+'")
        return names

    @field_validator("audio_rate")
    @classmethod
    def _fits_flac(cls, rate: int | None) -> int | None:
        if rate is not None and rate > 65_535 and rate % 10:
            raise ValueError(f"{rate}: above 65,535 FLAC knows multiples of 10 alone")
        return rate

    @property
    def reencoded(self) -> dict[str, dict[str, int | str | None]]:
        """What members are made of, beside their source: settings by modality, for those that are written anew."""
        text = {"clean_text": "html" if self.strip_html else "plain"} if self.clean_text or self.strip_html else {}
        image = {"max_side": self.image_side, "format": self.image_format}
        found: dict[str, dict[str, int | str | None]] = {}
        if self.image_side is not None or self.image_format is not None:
            found["image"] = {**image}
        if text:
            found["text"] = {**text}
        if self.audio_rate is not None:
            found["audio"] = {"format": "flac", "sampling_rate": self.audio_rate}
        return found


class BuildConfig(Settings):
    """One dataset that a run builds before it starts, unless it is there already."""

    source: str = Field(
        description="Manifest (.csv, .jsonl, .parquet), folder of files, tars, `hf:` and a Hugging Face dataset, or "
        "the embedded source `digits`."
    )
    out: str = Field(description="Dataset folder to write.")
    split: str | None = Field(
        None, description="Keep this split: a manifest's rows with it in `split`, or a Hugging Face dataset's."
    )
    shard_size: PositiveInt = Field(1000, description="Samples a shard.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Our name for a column and the source's, for example {image: img_path}."
    )
    allow: list[str] = Field(default_factory=list, description="Further folders that the source's files may lie in.")
    on_error: Literal["fail", "skip"] = Field(
        "fail", description="A bad row ends the build, or goes to quarantine.jsonl."
    )
    join: list[str] = Field(default_factory=list, description="Further sources that add what they have for a key.")
    join_columns: dict[str, str] = Field(default_factory=dict, description="The same as `columns`, of joined sources.")
    streaming: bool = Field(False, description="Read a Hugging Face dataset as a stream.")
    prefix_keys: bool = Field(False, description="Put the tar's name before each key, for tars that repeat theirs.")
    prepare: PrepareConfig = Field(
        default_factory=PrepareConfig, description="What is left out, cleaned and written anew."
    )


class ImageConfig(Settings):
    """Images: decoded to RGB, resized, cut into patches of uint8.

    With `size` null the aspect ratio is kept and the image is resized to the largest grid that fits `max_soft_tokens`
    (what Gemma4's own image processor does). With `size` set every image becomes a square of that many pixels.
    """

    size: PositiveInt | None = Field(None, description="Side of a fixed square in pixels; null keeps the aspect ratio.")
    patch_size: PositiveInt = Field(16, description="Side of one patch in pixels.")
    pooling: int = Field(
        3, ge=2, description="pooling x pooling patches become one soft token (transformers' Gemma4 breaks on 1)."
    )
    max_soft_tokens: Literal[70, 140, 280, 560, 1120] = Field(70, description="Most soft tokens one image may take.")
    draft: bool = Field(
        False,
        description="Decode JPEGs of at least four times `size` a side at half size or less: faster, nearly the same.",
    )
    max_pixels: PositiveInt = Field(
        64_000_000, description="An image that declares more is refused unread; WEBP, CMYK, progressive JPEG: half."
    )

    @model_validator(mode="after")
    def _grid_fits(self) -> ImageConfig:
        cell = self.patch_size * self.pooling
        if self.draft and self.size is None:
            raise ValueError("draft needs a fixed size: with the aspect ratio kept, the grid follows the exact size")
        if self.size is not None and self.size % cell:
            raise ValueError(f"size {self.size} is not a multiple of patch_size x pooling = {cell}")
        if self.size is not None and (self.size // cell) ** 2 > self.max_soft_tokens:
            raise ValueError(
                f"size {self.size} gives {(self.size // cell) ** 2} soft tokens, more than max_soft_tokens "
                f"{self.max_soft_tokens}: raise max_soft_tokens or pooling"
            )
        return self

    @property
    def max_patches(self) -> int:
        """Patches an image may take: exactly (size / patch_size)**2, or the native budget."""
        if self.size is not None:
            return (self.size // self.patch_size) ** 2
        return self.max_soft_tokens * self.pooling**2


class AudioConfig(Settings):
    """Sound: decoded to mono, resampled, shipped as int16; the log-mel is made on the training device."""

    sampling_rate: PositiveInt = Field(16_000, description="Samples a second after resampling.")
    max_seconds: float = Field(30.0, gt=0, description="Longer sounds are cut to this length.")
    max_declared_seconds: float = Field(7200.0, gt=0, description="A file that declares more is refused unread.")
    mel_bins: PositiveInt = Field(128, description="Mel filters.")
    frame_ms: float = Field(20.0, gt=0, description="Length of an analysis window in milliseconds.")
    hop_ms: float = Field(10.0, gt=0, description="Distance between two windows in milliseconds.")
    min_frequency: float = Field(0.0, ge=0, description="Lowest mel frequency in hertz.")
    max_frequency: float | None = Field(None, description="Highest mel frequency in hertz; null is half the rate.")
    mel_mean: float = Field(0.0, description="Subtracted from every log-mel value.")
    mel_std: float = Field(1.0, gt=0, description="Log-mel values are divided by this.")

    @model_validator(mode="after")
    def _band_is_not_empty(self) -> AudioConfig:
        if self.top_frequency > self.sampling_rate / 2:
            raise ValueError(f"max_frequency {self.top_frequency} is above half the sampling rate {self.sampling_rate}")
        if self.min_frequency >= self.top_frequency:
            raise ValueError(f"min_frequency {self.min_frequency} is not below max_frequency {self.top_frequency}")
        return self

    @property
    def top_frequency(self) -> float:
        """Highest mel frequency in hertz."""
        return self.sampling_rate / 2 if self.max_frequency is None else self.max_frequency


class TextConfig(Settings):
    """Text: one tokenizer for captions, transcripts and prompts."""

    tokenizer: str | None = Field(
        None, description="Local Hugging Face tokenizer folder; null trains a byte-level BPE."
    )
    vocab_size: PositiveInt = Field(2048, description="Entries of the trained BPE, special tokens included.")
    max_tokens: PositiveInt = Field(128, description="Longer texts are cut to this many tokens.")
    max_bytes: PositiveInt = Field(1_000_000, description="A longer text is refused.")


class AugmentConfig(Settings):
    """Random changes to training samples, drawn from (seed, epoch, index): the same for any number of workers."""

    image_shift: Fraction = Field(0.0, description="Largest shift, as a share of the side.")
    image_scale: Fraction = Field(0.0, description="Largest relative change of size.")
    image_rotate: float = Field(0.0, ge=0, le=180, description="Largest rotation in degrees.")
    image_crop: Fraction = Field(1.0, gt=0, description="Smallest share of the area that a random crop keeps.")
    image_flip: Fraction = Field(0.0, description="Chance of a horizontal flip.")
    image_noise: Fraction = Field(0.0, description="Largest standard deviation of Gaussian noise, 1 = full scale.")
    audio_speed: Fraction = Field(0.0, description="Largest relative change of speed (and pitch).")
    audio_shift_seconds: float = Field(0.0, ge=0, description="Most silence put before the sound.")
    audio_gain_db: float = Field(0.0, ge=0, description="Largest change of loudness.")
    audio_noise: Fraction = Field(0.0, description="Largest level of added noise relative to the sound's RMS.")
    audio_tilt_db: float = Field(0.0, ge=0, description="Largest spectral tilt over the band, up or down.")
    audio_equalizer_db: float = Field(
        0.0, ge=0, description="Largest gain or loss at six points of the band, as another microphone has."
    )
    mel_warp: Fraction = Field(0.0, description="Largest relative warp of the mel axis (another vocal tract).")
    mel_time_masks: int = Field(0, ge=0, description="SpecAugment: time masks a sound.")
    mel_time_mask_share: Fraction = Field(0.1, description="Longest time mask, as a share of the sound.")
    mel_frequency_masks: int = Field(0, ge=0, description="SpecAugment: frequency masks a sound.")
    mel_frequency_mask_share: Fraction = Field(0.1, description="Widest frequency mask, as a share of the band.")


class RemoteConfig(Settings):
    """Datasets whose folder is a URL (file, http, https, s3, gs, hf)."""

    mode: Literal["cache", "range"] = Field(
        "cache",
        description="cache: whole shards to the local disk, ahead of use; range: each sample's bytes, no cache.",
    )
    cache_dir: str | None = Field(
        None,
        description="Folder on a disk of the node, shared by its ranks; null is TRIPTYCH_CACHE_DIR, or "
        "~/.cache/triptych (XDG_CACHE_HOME).",
    )
    max_cache_gb: float = Field(100.0, gt=0, description="The cache is never larger (1 GB = 10**9 bytes).")
    ahead_steps: PositiveInt = Field(32, description="Steps ahead of the trained one whose shards are fetched.")
    downloads: PositiveInt = Field(4, description="Shards that a rank fetches at a time.")
    retries: int = Field(8, ge=0, description="Attempts in a row without progress after the first one.")
    retry_seconds: float = Field(0.5, gt=0, description="First pause between two attempts; it doubles up to 30.")
    timeout_seconds: float = Field(30.0, gt=0, description="A server that is silent for so long is given up.")
    allow_private_addresses: bool = Field(
        False, description="Allow servers at private, loopback and link-local addresses."
    )


class DataConfig(Settings):
    """Everything between dataset folders and batches."""

    train: str | list[SourceConfig] = Field(description="Dataset folder or its URL, or a list of {path, weight}.")
    temperature: float | None = Field(
        None, gt=0, description="Instead of weights: shares follow size ** (1 / temperature); 1 is by size."
    )
    eval: str | list[SourceConfig] | None = Field(None, description="Dataset folder, or its URL, for evaluation.")
    build: list[BuildConfig] = Field(default_factory=list, description="Datasets to build first where absent.")
    global_batch: PositiveInt = Field(64, description="Samples an optimizer step, over all ranks.")
    micro_batch: PositiveInt | None = Field(
        None, description="Samples a rank a forward pass; null is the rank's share."
    )
    num_workers: int = Field(2, ge=0, description="Loader workers a rank; 0 loads in the training process.")
    worker_type: Literal["process", "thread"] = Field("process", description="What a worker is.")
    prefetch: PositiveInt = Field(2, description="Batches that each worker keeps ready.")
    num_streams: PositiveInt = Field(720, description="Canonical streams of the order.")
    shuffle_block: PositiveInt = Field(4_096, description="Samples shuffled together within a stream.")
    tail: Literal["wrap", "drop"] = Field(
        "wrap", description="End of an epoch: go on into the next one within a batch, or drop the short batch."
    )
    max_bad_rate: Fraction = Field(0.01, description="Share of bad samples past which the run stops.")
    max_bad_run: PositiveInt = Field(100, description="Bad samples in a row past which the run stops.")
    pack_tokens: PositiveInt = Field(512, description="Tokens a packed row of the language model.")
    image: ImageConfig = Field(default_factory=ImageConfig, description="Images.")
    audio: AudioConfig = Field(default_factory=AudioConfig, description="Sound.")
    text: TextConfig = Field(default_factory=TextConfig, description="Text.")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="Augmentation of training samples.")
    remote: RemoteConfig = Field(default_factory=RemoteConfig, description="Datasets behind a URL.")

    @model_validator(mode="after")
    def _one_kind_of_mixture(self) -> DataConfig:
        sources = self.train_sources
        ways = {
            "weight": any(source.weight is not None for source in sources),
            "epochs": any(source.epochs is not None for source in sources),
            "temperature": self.temperature is not None,
        }
        used = [way for way, there in ways.items() if there]
        if len(used) > 1:
            raise ValueError(f"the mixture is given by {' and '.join(used)}: use one of them")
        if ways["epochs"] and any(source.epochs is None for source in sources):
            raise ValueError("give the epochs of every source in train, or of none")
        return self

    @property
    def train_sources(self) -> list[SourceConfig]:
        """`train` as a list, whichever way it was written."""
        return [SourceConfig(path=self.train)] if isinstance(self.train, str) else list(self.train)

    @property
    def eval_sources(self) -> list[SourceConfig]:
        """`eval` as a list; empty when there is none."""
        if self.eval is None:
            return []
        return [SourceConfig(path=self.eval)] if isinstance(self.eval, str) else list(self.eval)
