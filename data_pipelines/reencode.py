"""Members written anew at build time: sounds as mono FLAC at one rate, images capped at a side or in one format.

A member that is as asked already keeps its bytes. The bytes of the others are a function of the source's bytes, the
settings, and the versions of the libraries that write them (`library_versions`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
from PIL import Image

from data_pipelines.config import ImageConfig
from data_pipelines.decode import DecodeError, load_image, read_audio_blocks, to_int16
from data_pipelines.headers import image_size

ImageFormat = Literal["jpeg", "png", "webp"]
MAX_AUDIO_SECONDS = 4 * 3600.0
_MAX_PIXELS = ImageConfig().max_pixels
_EXTENSIONS: dict[str, str] = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 92, "subsampling": 0},
    "PNG": {"optimize": False},
    "WEBP": {"quality": 92, "method": 4},
}


def library_versions() -> dict[str, str]:
    """Versions of what writes members, for build.json."""
    from PIL import __version__ as pillow
    from PIL import features

    codecs = {name: features.version(name) or "none" for name in ("jpg", "webp", "zlib")}
    flac = {"libsndfile": soundfile.__libsndfile_version__, "libsoxr": soxr.__libsoxr_version__}
    return {"pillow": pillow, **codecs, **flac}


def reencode_audio(data: bytes, sampling_rate: int) -> bytes:
    """A sound as FLAC: mono (channels are averaged), 16 bits, `sampling_rate` in hertz.

    What is mono FLAC at this rate already is returned as it is. Raises `DecodeError` as decoding does, and for more
    than `MAX_AUDIO_SECONDS`. Memory does not grow with the length, but for the encoded bytes.
    """
    rate, channels, kind, blocks = read_audio_blocks(data, MAX_AUDIO_SECONDS)
    if (kind, channels, rate) == ("FLAC", 1, sampling_rate):
        return data
    file, written = io.BytesIO(), 0
    with soundfile.SoundFile(file, "w", sampling_rate, 1, "PCM_16", format="FLAC") as encoder:
        for block in blocks if rate == sampling_rate else _resampled(blocks, rate, sampling_rate):
            encoder.write(to_int16(block))
            written += len(block)
    if not written:
        raise DecodeError("empty", f"a sound shorter than one sample at {sampling_rate} Hz")
    return file.getvalue()


def _resampled(
    blocks: Iterator[npt.NDArray[np.float32]], rate: int, sampling_rate: int
) -> Iterator[npt.NDArray[np.float32]]:
    resampler = soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32")
    for block in blocks:
        yield resampler.resample_chunk(block, last=False)
    yield resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True)


def reencode_image(data: bytes, max_side: int | None, image_format: ImageFormat | None) -> tuple[bytes, str]:
    """(bytes, extension) of an image whose longer side is at most `max_side` pixels, in `image_format` or its own.

    What is small enough, and in that format, is returned as it is. Others become upright, 8 bits a channel, gray or
    RGB, without transparency and notes. Raises `DecodeError` as decoding does.
    """
    header = image_size(data)
    own = header[0] if header is not None else ""
    wanted = image_format.upper() if image_format is not None else own
    if header is not None and own == wanted and (max_side is None or max(header[1:]) <= max_side):
        return data, _EXTENSIONS[own]
    image = load_image(data, _MAX_PIXELS)
    if max_side is not None and max(image.size) > max_side:
        width, height = (max(1, round(side * max_side / max(image.size))) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if _is_gray(image) and wanted != "WEBP":
        image = image.getchannel(0)
    file = io.BytesIO()
    try:
        image.save(file, wanted, **_OPTIONS[wanted])
    except (OSError, ValueError) as error:
        raise DecodeError(
            "size", f"{image.size[0]} x {image.size[1]} pixels do not go into {wanted} ({error})"
        ) from error
    return file.getvalue(), _EXTENSIONS[wanted]


def _is_gray(image: Image.Image) -> bool:
    pixels = np.asarray(image)
    return bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all())
