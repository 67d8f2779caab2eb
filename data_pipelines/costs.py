"""What samples cost, from the index alone: tokens that the towers and the language model will see.

Ranks are dealt equal costs before a byte is read, and rows are packed by these lengths when a run is planned. Images
count exactly as they are decoded; text is estimated from its bytes, sound from the seconds that its header declares.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data_pipelines.config import DataConfig, ImageConfig
from data_pipelines.dataset import Costs

_BYTES_A_TOKEN = 4
# The audio tower subsamples the mel frames by four in time.
_FRAMES_A_TOKEN = 4

IntArray = npt.NDArray[np.int64]


def num_patches(width: npt.ArrayLike, height: npt.ArrayLike, config: ImageConfig) -> IntArray:
    """Patches of images of these sizes in pixels, as `decode.target_size` makes them: int64; 0 for a side of 0."""
    wide, high = np.asarray(width, dtype=np.int64), np.asarray(height, dtype=np.int64)
    there = (wide > 0) & (high > 0)
    if config.size is not None:
        return np.where(there, config.max_patches, 0)
    cell = config.patch_size * config.pooling
    wide, high = np.maximum(wide, 1), np.maximum(high, 1)
    factor = np.sqrt(config.max_patches * config.patch_size**2 / (wide * high)) / cell
    # A side of less than one cell becomes one, and the other as long as the shape asks for.
    columns = np.clip((factor * wide).astype(np.int64), 1, config.max_soft_tokens)
    rows = np.clip((factor * high).astype(np.int64), 1, config.max_soft_tokens)
    cells = np.minimum(columns * rows, config.max_soft_tokens)
    return np.where(there, cells * config.pooling**2, 0)


def soft_tokens(costs: Costs, config: DataConfig) -> tuple[IntArray, IntArray, IntArray]:
    """Language-model tokens of the samples' (image, sound, text), each int64, 0 where the modality is missing."""
    image = num_patches(costs.width, costs.height, config.image) // config.image.pooling**2
    seconds = np.minimum(costs.audio_seconds.astype(np.float64), config.audio.max_seconds)
    audio = np.ceil(seconds * 1000 / config.audio.hop_ms / _FRAMES_A_TOKEN).astype(np.int64)
    text = np.minimum(-(-costs.text_bytes // _BYTES_A_TOKEN), config.text.max_tokens)
    return image, audio, text


def sample_costs(costs: Costs, config: DataConfig) -> npt.NDArray[np.float64]:
    """Tokens of the vision tower, the audio tower and the language model together: float64, one a sample."""
    image, audio, text = soft_tokens(costs, config)
    # A sample with text is one segment with its image and sound, and one without.
    language = np.where(text > 0, image + audio + 2 * text, 0)
    total: npt.NDArray[np.float64] = (image * config.image.pooling**2 + audio + language).astype(np.float64)
    return total
