"""Pictures for pages that hold everything in themselves: thumbnails, spectrograms, and addresses that carry their data.

The spectrograms are for looking at; what a model hears is made by `pretrain.features`.
"""

from __future__ import annotations

import base64
import functools
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

# Anchors of matplotlib's "magma" (van der Walt and Smith), interpolated: dark is quiet.
_MAGMA = np.array(
    [
        [0, 0, 4],
        [40, 17, 89],
        [101, 26, 128],
        [159, 47, 127],
        [212, 72, 97],
        [245, 125, 93],
        [254, 194, 135],
        [252, 253, 191],
    ]
)
_MAX_FRAMES = 600
_FLOOR = 1e-4


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as an address that a page can hold in itself; `kind` is a MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def thumbnail(image: Image.Image, side: int, lossless_side: int = 64) -> tuple[bytes, str]:
    """An RGB image with no side above `side` pixels, encoded, and its MIME type.

    Up to `lossless_side` pixels it stays as it is, in a PNG: such pictures are looked at pixel by pixel.
    """
    file = io.BytesIO()
    if max(image.size) <= lossless_side:
        image.save(file, "PNG", optimize=True)
        return file.getvalue(), "image/png"
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(file, "JPEG", quality=82, optimize=True)
    return file.getvalue(), "image/jpeg"


def mel_levels(wave: npt.NDArray[np.float32], rate: int, bins: int = 64) -> npt.NDArray[np.float32]:
    """A log-mel spectrogram for the eye: float32 [F, bins], F at most about 600.

    Args:
        wave: float32 [T], at least one sample.
        rate: samples a second.
        bins: mel bands from 0 to half the rate (O'Shaughnessy's formula, triangles of height 1).
    """
    frame = max(2, round(0.025 * rate))
    hop = max(1, round(0.005 * rate), len(wave) // _MAX_FRAMES)
    padded = np.pad(wave, (frame // 2, frame))
    frames = np.lib.stride_tricks.sliding_window_view(padded, frame)[: len(wave) : hop]
    # Four times the window: else the lowest bands of a narrow sound would fall between two frequencies.
    length = 4 << (frame - 1).bit_length()
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(frame).astype(np.float32), n=length))
    return np.log(spectrum @ _mel_filters(rate, length, bins) + _FLOOR).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _mel_filters(rate: int, length: int, bins: int) -> npt.NDArray[np.float64]:
    frequencies = np.fft.rfftfreq(length, 1 / rate)
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bins + 2) / 2595) - 1)
    below, peak, above = edges[:-2], edges[1:-1], edges[2:]
    rising = (frequencies[:, None] - below) / (peak - below)
    falling = (above - frequencies[:, None]) / (above - peak)
    filters: npt.NDArray[np.float64] = np.clip(np.minimum(rising, falling), 0, None)
    return filters


def spectrogram_png(mel: npt.NDArray[np.floating], height: int = 96, width: int = 240) -> bytes:
    """A log-mel spectrogram as a PNG, time to the right, low frequencies at the bottom.

    Args:
        mel: float [F, mel_bins], any scale; it is stretched from its 5th to its 99.5th percentile.
        height, width: size in pixels.
    """
    low, high = np.percentile(mel, [5, 99.5])
    level = np.clip((mel - low) / max(high - low, 1e-6), 0, 1).T[::-1]
    image = Image.fromarray(np.rint(level * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    image.putpalette(_palette())
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return file.getvalue()


@functools.cache
def _palette() -> bytes:
    place = np.linspace(0, len(_MAGMA) - 1, 256)
    anchors = np.arange(len(_MAGMA))
    colours = np.stack([np.interp(place, anchors, _MAGMA[:, channel]) for channel in range(3)], axis=1)
    table: npt.NDArray[np.uint8] = np.rint(colours).astype(np.uint8)
    return table.tobytes()
