"""The only place where foreign bytes become pixels, waves and text.

Formats are an allow-list and are chosen by the first bytes, never by a name. What a header declares is checked before a
pixel or a sample is allocated, and what came out is checked again. Whatever goes wrong inside a decoder becomes a
`DecodeError` with a reason; nothing here ends a run.

Images follow transformers' `Gemma4ImageProcessorPil`, so that uint8 / 255 equals what the exported processor computes.
"""

from __future__ import annotations

import functools
import io
import json
import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import soxr
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from data_pipelines.config import AudioConfig, ImageConfig
from data_pipelines.headers import image_size, jpeg_first_scan, jpeg_scans, png_chunks

MAX_IMAGE_BYTES = 64 << 20
MAX_AUDIO_BYTES = 64 << 20
# JPEG's own limit. A resize holds 32 bytes for each pixel of a side, so a line of 64 million would take 2 GB.
MAX_SIDE = 65_535
# Writers use about ten. A scan of a few bytes may cost as much as the whole picture.
_MAX_JPEG_SCANS = 100
# Chunks are read one by one in Python: short ones are a slow way to nowhere.
_FREE_CHUNKS, _BYTES_A_CHUNK = 1000, 512
_STRIP_PIXELS = 1 << 20
MAX_CHANNELS = 32
MIN_RATE, MAX_RATE = 1_000, 768_000
_READ_FRAMES = 1 << 19
_LOUDEST = np.float32(32_768)

# Opened by class: Image.open would try every plugin, and warn about sizes that our own, stricter limit has passed.
_OPENERS: dict[str, type[ImageFile.ImageFile]] = {"JPEG": JpegImageFile, "PNG": PngImageFile, "WEBP": WebPImageFile}
_EXIF_SOURCES = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A corrupt note in one of a million images is no news to the person who watches a run.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# Their headers only estimate the length.
_LENIENT_FORMATS = frozenset({"MP3", "OGG", "MPEG"})


class DecodeError(ValueError):
    """A member that cannot be used. `reason` is one word for counting, `detail` is for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[DecodeError], tuple[str, str]]:
        return DecodeError, (self.reason, self.detail)


def decode_text(data: bytes, max_bytes: int) -> str | None:
    """UTF-8 text without byte order mark and without white space around it; None when nothing is left.

    Raises `DecodeError` for more than `max_bytes`, for bytes that are not UTF-8 and for a NUL.
    """
    if len(data) > max_bytes:
        raise DecodeError("size", f"a text of {len(data)} bytes, more than {max_bytes}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DecodeError("encoding", f"not UTF-8 at byte {error.start}") from error
    if "\0" in text:
        raise DecodeError("encoding", f"a NUL at character {text.index(chr(0))}")
    return text.removeprefix("\ufeff").strip() or None


def decode_metadata(data: bytes, max_bytes: int) -> dict[str, Any]:
    """A JSON object; NaN and infinities, which JSON does not know, become None.

    Raises `DecodeError` for anything else and for more than `max_bytes`.
    """
    if len(data) > max_bytes:
        raise DecodeError("size", f"metadata of {len(data)} bytes, more than {max_bytes}")
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_no_number, parse_float=_finite)
        if b"\\ud" in data or b"\\uD" in data:
            # Half of a surrogate pair could be neither printed nor written again.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise DecodeError("json", f"metadata is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DecodeError("json", f"metadata is a JSON {type(value).__name__}, not an object")
    return value


def _no_number(_: str) -> None:
    return None


def _finite(digits: str) -> float | None:
    value = float(digits)
    return value if math.isfinite(value) else None


def load_image(data: bytes, max_pixels: int, enough: tuple[int, int] | None = None) -> Image.Image:
    """A JPEG, PNG or WEBP as an upright RGB image; the first frame of an animation.

    With `enough` (width, height) a JPEG may come out at 1/2, 1/4 or 1/8 of its size, as long as no side is smaller than
    that whichever way up it is: the smaller picture comes straight out of its DCT blocks. EXIF orientation is applied,
    16-bit gray is scaled to 8 bits, transparency is laid over white. Raises `DecodeError` for other formats, for more
    than `max_pixels`, and for bytes that do not decode. WEBP, CMYK and JPEGs of several scans may have half of
    `max_pixels`: their decoders hold twice as much.
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise DecodeError("size", f"an image of {len(data)} bytes, more than {MAX_IMAGE_BYTES}")
    header = image_size(data)
    if header is None:
        raise DecodeError("format", f"not a JPEG, PNG or WEBP (begins with {data[:8]!r})")
    kind, width, height = header
    _check_pixels(width, height, max_pixels // 2 if kind == "WEBP" else max_pixels)
    chunks = _FREE_CHUNKS + len(data) // _BYTES_A_CHUNK
    if kind == "PNG" and png_chunks(data, chunks) > chunks:
        raise DecodeError("size", f"a PNG of more than {chunks} chunks")
    if kind == "JPEG" and not jpeg_first_scan(data):
        raise DecodeError("decode", "a JPEG without a picture, or behind too many segments")
    try:
        image: Image.Image = _OPENERS[kind](io.BytesIO(data))
        _check_pixels(*image.size, max_pixels)
        if kind == "JPEG":
            _check_scans(data, image, max_pixels)
        if enough is not None and isinstance(image, JpegImageFile):
            image.draft(None, (max(enough), max(enough)))
        image.load()
        image = _turn_upright(image)
        return _to_rgb(image)
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - decoders of foreign bytes raise anything
        raise DecodeError("decode", f"{kind} does not decode ({type(error).__name__}: {error})") from error


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1 or width * height > max_pixels:
        raise DecodeError("size", f"an image of {width} x {height} pixels, more than {max_pixels} or none")
    if max(width, height) > MAX_SIDE:
        raise DecodeError("size", f"an image of {width} x {height} pixels, with a side of more than {MAX_SIDE}")


def _check_scans(data: bytes, image: Image.Image, max_pixels: int) -> None:
    large = image.width * image.height > max_pixels // 2
    if large and image.mode == "CMYK":
        _check_pixels(*image.size, max_pixels // 2)
    if "progressive" not in image.info and jpeg_first_scan(data) == len(image.getbands()):
        # All is in one scan, and nothing behind it is decoded.
        return
    scans = jpeg_scans(data, _MAX_JPEG_SCANS)
    if scans > _MAX_JPEG_SCANS:
        raise DecodeError("size", f"a JPEG of more than {_MAX_JPEG_SCANS} scans")
    if scans > 1 and large:
        _check_pixels(*image.size, max_pixels // 2)


def _turn_upright(image: Image.Image) -> Image.Image:
    if _EXIF_SOURCES.isdisjoint(image.info):
        return image
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - pixels that decoded are not given up for a broken note beside them
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    rows = max(1, _STRIP_PIXELS // image.width)
    if image.height <= rows:
        return _strip_to_rgb(image)
    # Strip by strip: each step of a conversion would hold the whole picture again.
    whole = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        whole.paste(_strip_to_rgb(strip), (0, top))
    return whole


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255.
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65_535)
        return Image.fromarray(((wide * 255 + 32_767) // 65_535).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, (255, 255, 255, 255)), clear).convert("RGB")
    return image.convert("RGB")


def target_size(width: int, height: int, config: ImageConfig) -> tuple[int, int]:
    """(width, height) in pixels that an image is resized to.

    Without a fixed `size` this is transformers' `get_aspect_ratio_preserving_size`: the largest size within the patch
    budget whose sides are multiples of patch_size x pooling. Raises `DecodeError` for a shape that no such size fits.
    """
    if config.size is not None:
        return config.size, config.size
    cell = config.patch_size * config.pooling
    budget = config.max_patches * config.patch_size**2
    factor = math.sqrt(budget / (width * height))
    wide, high = int(factor * width / cell) * cell, int(factor * height / cell) * cell
    longest = config.max_soft_tokens * cell
    if not wide and not high:
        raise DecodeError("size", f"{width} x {height} pixels do not fill one cell of {cell} pixels")
    if not high:
        wide, high = min(width // height * cell, longest), cell
    elif not wide:
        wide, high = cell, min(height // width * cell, longest)
    if wide * high > budget:
        raise DecodeError("size", f"{width} x {height} pixels do not fit into {config.max_patches} patches")
    return wide, high


def resize_image(
    image: Image.Image, config: ImageConfig, box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    """Resize (bicubic, antialiased) to the target size; `box` (left, top, right, bottom) takes that part alone."""
    left, top, right, bottom = box or (0, 0, *image.size)
    size = target_size(max(1, round(right - left)), max(1, round(bottom - top)), config)
    if box is None and size == image.size:
        return image
    return image.resize(size, Image.Resampling.BICUBIC, box)


def patchify(pixels: npt.NDArray[np.uint8], patch_size: int) -> npt.NDArray[np.uint8]:
    """Pixels [H, W, 3] into patches [H/p * W/p, p*p*3], row-major, each laid out (row, column, channel)."""
    height, width, channels = pixels.shape
    cut = pixels.reshape(height // patch_size, patch_size, width // patch_size, patch_size, channels)
    return cut.transpose(0, 2, 1, 3, 4).reshape(-1, patch_size * patch_size * channels)


@functools.lru_cache(maxsize=1024)
def patch_positions(columns: int, rows: int) -> npt.NDArray[np.int64]:
    """(x, y) of every patch of a grid, row-major: int64 [rows * columns, 2], read-only."""
    y, x = np.divmod(np.arange(rows * columns, dtype=np.int64), columns)
    grid = np.stack([x, y], axis=1)
    grid.flags.writeable = False
    return grid


def load_audio(data: bytes, config: AudioConfig) -> npt.NDArray[np.float32]:
    """A WAV, FLAC, OGG or MP3 as float32 [T], mono, at `sampling_rate`, cut to `max_seconds`.

    Channels are averaged. No more is decoded than is kept. Raises `DecodeError` for what libsndfile does not read, for
    a declared length above `max_declared_seconds`, for no samples, and for values that are not finite.
    """
    if len(data) > MAX_AUDIO_BYTES:
        raise DecodeError("size", f"a sound of {len(data)} bytes, more than {MAX_AUDIO_BYTES}")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            _check_declared(sound, config.max_declared_seconds)
            rate, declared, kind = sound.samplerate, sound.frames, sound.format
            wanted = min(declared, math.ceil(config.max_seconds * rate))
            wave = _read_mono(sound, wanted)
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - decoders of foreign bytes raise anything
        raise DecodeError("decode", f"the sound does not decode ({type(error).__name__}: {error})") from error
    if len(wave) < wanted and kind not in _LENIENT_FORMATS:
        raise DecodeError("truncated", f"{len(wave)} of {declared} declared samples")
    if not len(wave):
        raise DecodeError("empty", "a sound of no samples")
    if not np.isfinite(wave).all():
        raise DecodeError("decode", "a sound with values that are not finite")
    # Far beyond any loudness, and far from where the resampler would overflow.
    np.clip(wave, -_LOUDEST, _LOUDEST, out=wave)
    if rate != config.sampling_rate:
        wave = soxr.resample(wave, rate, config.sampling_rate)
        if not len(wave):
            raise DecodeError("empty", "a sound shorter than one sample")
    kept: npt.NDArray[np.float32] = wave[: max_samples(config)]
    return kept


def _check_declared(sound: soundfile.SoundFile, max_seconds: float) -> None:
    rate, channels = sound.samplerate, sound.channels
    if not MIN_RATE <= rate <= MAX_RATE or not 1 <= channels <= MAX_CHANNELS:
        raise DecodeError("size", f"{channels} channels at {rate} Hz, outside what is read")
    if sound.frames > max_seconds * rate:
        raise DecodeError("size", f"declares {sound.frames / rate:.0f} s, more than {max_seconds:g} s")


def read_audio_blocks(data: bytes, max_seconds: float) -> tuple[int, int, str, Iterator[npt.NDArray[np.float32]]]:
    """(rate in hertz, channels, format, blocks) of a sound; the blocks are float32 [n], mono, and decoded as they go.

    Raises `DecodeError`, at once or from the blocks, for what `load_audio` refuses, with `max_seconds` as the longest.
    """
    if len(data) > MAX_AUDIO_BYTES:
        raise DecodeError("size", f"a sound of {len(data)} bytes, more than {MAX_AUDIO_BYTES}")
    try:
        sound = soundfile.SoundFile(io.BytesIO(data))
        _check_declared(sound, max_seconds)
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - decoders of foreign bytes raise anything
        raise DecodeError("decode", f"the sound does not decode ({type(error).__name__}: {error})") from error
    return sound.samplerate, sound.channels, sound.format, _blocks(sound)


def _blocks(sound: soundfile.SoundFile) -> Iterator[npt.NDArray[np.float32]]:
    declared, num_read = sound.frames, 0
    with sound:
        while num_read < declared:
            try:
                block = _read_mono(sound, min(_READ_FRAMES, declared - num_read))
            except (soundfile.SoundFileError, RuntimeError) as error:
                raise DecodeError("decode", f"the sound does not decode ({error})") from error
            if not len(block):
                break
            if not np.isfinite(block).all():
                raise DecodeError("decode", "a sound with values that are not finite")
            num_read += len(block)
            # Far beyond any loudness, and far from where a resampler would overflow.
            yield np.clip(block, -32_768.0, 32_768.0)
    if num_read < declared and sound.format not in _LENIENT_FORMATS:
        raise DecodeError("truncated", f"{num_read} of {declared} declared samples")
    if not num_read:
        raise DecodeError("empty", "a sound of no samples")


def max_samples(config: AudioConfig) -> int:
    """Samples at `sampling_rate` that `max_seconds` take."""
    return max(1, int(config.max_seconds * config.sampling_rate))


def _read_mono(sound: soundfile.SoundFile, wanted: int) -> npt.NDArray[np.float32]:
    parts: list[npt.NDArray[np.float32]] = []
    while wanted > 0:
        part = sound.read(min(wanted, _READ_FRAMES), dtype="float32", always_2d=True)
        if not len(part):
            break
        parts.append(part[:, 0] if part.shape[1] == 1 else part.mean(axis=1, dtype=np.float32))
        wanted -= len(part)
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)


def to_int16(wave: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Float samples in -1..1 as int16, so that 16-bit sources come back unchanged; louder ones are clipped."""
    whole: npt.NDArray[np.int16] = np.clip(np.rint(wave * np.float32(32_768)), -32_768, 32_767).astype(np.int16)
    return whole
