"""What a file says about its own size, from the first bytes: nothing is decoded.

Costs are known from these numbers before a sample is read, and decoding refuses what declares too much before a pixel
or a sample is allocated. A header may lie; decoding checks again.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator

# Start-of-frame markers of JPEG (ITU-T T.81, table B.1): all of C0 to CF but DHT, JPG and DAC.
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset(range(0xD0, 0xD9)) | {0x00, 0x01}
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA
# Inside a scan FF is followed by 00 or by a restart marker; anything else ends it.
_AFTER_SCAN = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
# Each costs a decoder some Python, and four bytes make one.
_MAX_SEGMENTS = 4096
_MAX_JUNK_BYTES = 4096


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
    for marker, position in _jpeg_segments(data, 2):
        if marker in _START_OF_FRAME and position + 9 <= len(data):
            height, width = struct.unpack(">HH", data[position + 5 : position + 9])
            return "JPEG", width, height
    return None


def _jpeg_segments(data: bytes, position: int) -> Iterator[tuple[int, int]]:
    """(marker, offset of its FF) from `position` to the first scan, or to what is no JPEG."""
    for _ in range(_MAX_SEGMENTS):
        # Readers pass over a little junk between segments.
        position = data.find(b"\xff", position, position + _MAX_JUNK_BYTES)
        if position < 0 or position + 4 > len(data):
            return
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        yield marker, position
        if marker in (_START_OF_SCAN, _END_OF_IMAGE):
            return
        position += 2
        if marker not in _WITHOUT_LENGTH:
            position += max(2, int.from_bytes(data[position : position + 2], "big"))


def jpeg_first_scan(data: bytes) -> int:
    """Components (1 to 4) that a JPEG's first scan holds; 0 where none is reached."""
    scan = next((at for marker, at in _jpeg_segments(data, 2) if marker == _START_OF_SCAN), -1)
    return data[scan + 4] if 0 <= scan < len(data) - 4 else 0


def jpeg_scans(data: bytes, limit: int) -> int:
    """Scans of a JPEG, counted up to `limit` + 1; 0 where none is reached. Each may cost as much as a whole picture."""
    position, count = 2, 0
    while True:
        scan = next((at for marker, at in _jpeg_segments(data, position) if marker == _START_OF_SCAN), None)
        if scan is None:
            return count
        count += 1
        if count > limit:
            return count
        following = _AFTER_SCAN.search(data, scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big"))
        if following is None:
            return count
        position = following.start()


def png_chunks(data: bytes, limit: int) -> int:
    """Chunks of a PNG up to its end, counted up to `limit` + 1."""
    position, count = 8, 0
    while position + 12 <= len(data) and count <= limit:
        count += 1
        if data[position + 4 : position + 8] == b"IEND":
            break
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return count


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
            return min(max(sound.frames, 0) / sound.samplerate, 1e9) if sound.samplerate > 0 else 0.0
    except Exception:  # noqa: BLE001 - readers of foreign bytes raise anything; decoding says what is wrong
        return 0.0


def audio_rate(data: bytes) -> int:
    """Samples a second that a sound's header declares; 0 where it cannot be read."""
    import soundfile

    try:
        return int(soundfile.info(io.BytesIO(data)).samplerate)
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError, OverflowError):
        return 0
