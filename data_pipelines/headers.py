"""What a file says about its own size, from the first bytes: nothing is decoded.

Costs are known from these numbers before a sample is read, and decoding refuses what declares too much before a pixel
or a sample is allocated. A header may lie; decoding checks again.
"""

from __future__ import annotations

import io
import struct

# Start-of-frame markers of JPEG (ITU-T T.81, table B.1): all of C0 to CF but DHT, JPG and DAC.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset(range(0xD0, 0xD9)) | {0x01}


def image_size(data: bytes) -> tuple[str, int, int] | None:
    """(format, width, height) of a JPEG, PNG or WEBP from its first bytes; None for anything else.

    Formats are Pillow's names. Width and height are in pixels, before any EXIF orientation.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        if len(data) >= 24 and data[12:16] == b"IHDR":
            width, height = struct.unpack(">II", data[16:24])
            return "PNG", width, height
        return None
    if data.startswith(b"\xff\xd8\xff"):
        return _jpeg_size(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp_size(data)
    return None


def _jpeg_size(data: bytes) -> tuple[str, int, int] | None:
    position = 2
    while position + 9 <= len(data):
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
        elif marker in _WITHOUT_LENGTH:
            position += 2
        elif marker in _START_OF_FRAME:
            height, width = struct.unpack(">HH", data[position + 5 : position + 9])
            return "JPEG", width, height
        else:
            position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4], "big"))
    return None


def _webp_size(data: bytes) -> tuple[str, int, int] | None:
    kind = data[12:16]
    if len(data) < 30:
        return None
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", data[26:30])
        return "WEBP", width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return "WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        return "WEBP", int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    return None


def audio_seconds(data: bytes) -> float:
    """Seconds that a sound's header declares; 0.0 where it cannot be read."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            return min(sound.frames / sound.samplerate, 1e9) if sound.samplerate > 0 else 0.0
    except (soundfile.SoundFileError, RuntimeError, TypeError, OverflowError):
        return 0.0


def audio_rate(data: bytes) -> int:
    """Samples a second that a sound's header declares; 0 where it cannot be read."""
    import soundfile

    try:
        return int(soundfile.info(io.BytesIO(data)).samplerate)
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError, OverflowError):
        return 0
