"""A corpus of hostile and broken bytes, made when it is asked for: members, whole tars, and rows of manifests.

Each case has a name, the bytes, and what the reader says of them: one of the reasons of quarantine.jsonl, or None where
the bytes are odd but good.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image, PngImagePlugin

from tests.data_pipelines.tuples import encode_image, encode_sound

BLOCK = 512
# What the reader of the corpus is told to refuse; the defaults need larger files to be exceeded.
MAX_PIXELS = 1_000_000
MAX_TEXT_BYTES = 1_000_000


@dataclass(frozen=True)
class Hostile:
    """One member of a sample: its extension and bytes, and the reason why the sample is left out, None if it is not."""

    name: str
    extension: str
    make: Callable[[], bytes]
    reason: str | None = None


def pixels(height: int, width: int, channels: int = 3) -> np.ndarray:
    """A picture that is neither flat nor noise: uint8 [H, W, C]."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / (5 + channel)) + np.cos(columns / (7 + channel)) for channel in range(channels)]
    return (127 + 60 * np.stack(waves, axis=-1)).astype(np.uint8).squeeze()


def tone(seconds: float = 0.3, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    """440 Hz: float64 [T] or [T, channels]."""
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    return wave if channels == 1 else np.stack([wave] * channels, axis=1)


# Pictures


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk with its length and CRC."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def blank_png(
    width: int, height: int, *, depth: int = 8, colour: int = 2, extra: bytes = b"", rows: int | None = None
) -> bytes:
    """A black PNG that declares this size; with `rows` it holds no more than those. `extra` chunks come before them."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    line = bytes(1 + (width * channels * depth + 7) // 8)
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(line) for _ in range(height if rows is None else rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    palette = png_chunk(b"PLTE", bytes(768)) + png_chunk(b"tRNS", bytes(256)) if colour == 3 else b""
    chunks = (png_chunk(b"IHDR", header), palette, extra, png_chunk(b"IDAT", data), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def saved(image: Image.Image, image_format: str, **options: object) -> bytes:
    """An image as a file of this format."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def _text_bomb(international: bool) -> bytes:
    info = PngImagePlugin.PngInfo()
    text = "x" * 50_000_000
    if international:
        info.add_itxt("a", text, zip=True)
    else:
        info.add_text("a", text, zip=True)
    return encode_image(pixels(10, 10), "PNG", pnginfo=info)


def _profile_bomb() -> bytes:
    return blank_png(10, 10, extra=png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000))))


def _exif_bomb() -> bytes:
    """Twenty thousand entries that each claim the same 200 KB: 4 GB for a reader that believes them."""
    entries = b"".join(struct.pack(">HHII", 0x200 + number, 7, 200_000, 8) for number in range(20_000))
    exif = b"MM\0\x2a\0\0\0\x08" + struct.pack(">H", 20_000) + entries + bytes(4)
    return blank_png(10, 10, extra=png_chunk(b"eXIf", exif))


def cmyk(width: int, height: int, **options: object) -> bytes:
    """A JPEG of four inks."""
    return saved(Image.new("CMYK", (width, height), (9, 99, 0, 9)), "JPEG", **options)


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = encode_image(pixels(64, 64), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def colour_after_colour(count: int) -> bytes:
    """A JPEG that is not progressive, has each colour in scans of its own, and in most of them nothing."""
    data = encode_image(pixels(64, 64), "JPEG")
    start = data.rindex(b"\xff\xda")
    scans = (b"\xff\xda\0\x08\1" + bytes([1 + n % 3, 0x11 * (n % 3 > 0)]) + b"\0\x3f\0\0" for n in range(count))
    return data[:start] + b"".join(scans) + data[-2:]


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode_image(pixels(40, 60), "JPEG", exif=exif)


def _animated(image_format: str) -> bytes:
    frames = [Image.new("RGB", (24, 24), colour) for colour in ("red", "green", "blue")]
    return saved(frames[0], image_format, save_all=True, append_images=frames[1:])


def _jpeg() -> bytes:
    return encode_image(pixels(200, 200), "JPEG")


def _inside(segments: bytes) -> bytes:
    """A JPEG with this behind its first segment, which takes 18 bytes."""
    return _jpeg()[:20] + segments + _jpeg()[20:]


IMAGES = [
    Hostile("png that declares 100,000 x 100,000", "png", lambda: blank_png(100_000, 100_000, rows=1), "size"),
    Hostile("png of no width", "png", lambda: blank_png(0, 10), "size"),
    Hostile("png one pixel high and 70,000 wide", "png", lambda: blank_png(70_000, 1), "size"),
    Hostile("png with a zTXt bomb", "png", lambda: _text_bomb(False), "decode"),
    Hostile("png with an iTXt bomb", "png", lambda: _text_bomb(True), "decode"),
    Hostile("png with a colour profile bomb", "png", _profile_bomb, "decode"),
    Hostile("png of 50,000 chunks", "png", lambda: blank_png(9, 9, extra=png_chunk(b"teSt", b"") * 50_000), "size"),
    Hostile("truncated png", "png", lambda: encode_image(pixels(200, 200))[:-2000], "decode"),
    Hostile("truncated jpeg", "jpg", lambda: _jpeg()[:1500], "decode"),
    Hostile("truncated webp", "webp", lambda: encode_image(pixels(200, 200), "WEBP")[:500], "decode"),
    Hostile("jpeg of 200 scans", "jpg", lambda: many_scans(200), "size"),
    Hostile("jpeg of 3 scans that is not progressive", "jpg", lambda: colour_after_colour(3), None),
    Hostile("jpeg of 200 scans that is not progressive", "jpg", lambda: colour_after_colour(200), "size"),
    Hostile("jpeg behind 5,000 comments", "jpg", lambda: _inside(b"\xff\xfe\0\2" * 5000), "format"),
    Hostile("webp over half the limit", "webp", lambda: saved(Image.new("RGB", (900, 900)), "WEBP"), "size"),
    Hostile("cmyk jpeg over half the limit", "jpg", lambda: cmyk(900, 900), "size"),
    Hostile("animated gif, whose extension nobody reads", "gif", lambda: _animated("GIF")),
    Hostile("animated gif called png", "png", lambda: _animated("GIF"), "format"),
    Hostile("postscript called jpg", "jpg", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n(id) run\n", "format"),
    Hostile("svg called png", "png", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "format"),
    Hostile("pickle called jpg", "jpg", lambda: pickle.dumps(Runs(Path("x"))), "format"),
    Hostile("image of no bytes", "jpg", lambda: b"", "format"),
    Hostile("png that declares 900 rows and holds one", "png", lambda: blank_png(900, 900, rows=1)),
    Hostile("animated png", "png", lambda: _animated("PNG")),
    Hostile("animated webp", "webp", lambda: _animated("WEBP")),
    Hostile("cmyk jpeg", "jpg", lambda: cmyk(64, 48)),
    Hostile("progressive jpeg", "jpg", lambda: encode_image(pixels(64, 64), "JPEG", progressive=True)),
    Hostile("16-bit gray png", "png", lambda: encode_image(pixels(20, 30, 1).astype(np.uint16) * 257)),
    Hostile("16-bit colour png", "png", lambda: blank_png(20, 30, depth=16)),
    Hostile("16-bit gray png with transparency", "png", lambda: blank_png(20, 30, depth=16, colour=4)),
    Hostile("palette png with transparency", "png", lambda: blank_png(20, 30, colour=3)),
    Hostile("one-bit png", "png", lambda: encode_image(pixels(64, 64, 1) > 128)),
    Hostile("exif-rotated jpeg", "jpg", _rotated),
    Hostile("exif bomb", "png", _exif_bomb),
    Hostile("broken exif", "jpg", lambda: encode_image(pixels(20, 30), "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff")),
    Hostile("image of 1 x 1", "png", lambda: encode_image(pixels(1, 1).reshape(1, 1, 3))),
    Hostile("png called jpg", "jpg", lambda: encode_image(pixels(30, 30))),
    Hostile("jpeg with junk between its segments", "jpg", lambda: _inside(bytes(100))),
    Hostile("jpeg with another file behind it", "jpg", lambda: _jpeg() + b"PK\3\4" + bytes(1000)),
]


# Sounds


def float_wav(values: Iterable[float], rate: int = 16_000) -> bytes:
    """A WAV of 32-bit floats, which may be any."""
    body = np.array(list(values), dtype="<f4").tobytes()
    layout = struct.pack("<HHIIHH", 3, 1, rate, 4 * rate, 4, 32)
    chunks = b"WAVEfmt " + struct.pack("<I", len(layout)) + layout + b"data" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def flac_that_declares(num_samples: int, rate: int = 16_000) -> bytes:
    """Half a second of FLAC whose header names another length."""
    data = bytearray(encode_sound(tone(0.5, rate), rate))
    packed = int.from_bytes(data[18:26], "big")
    data[18:26] = (packed >> 36 << 36 | num_samples).to_bytes(8, "big")
    return bytes(data)


def wav_that_declares(num_bytes: int) -> bytes:
    """A third of a second of WAV whose header names another length."""
    data = bytearray(encode_sound(tone(), 16_000, "WAV"))
    place = data.index(b"data") + 4
    data[place : place + 4] = struct.pack("<I", num_bytes)
    data[4:8] = struct.pack("<I", num_bytes + 36)
    return bytes(data)


def _sound(wave: np.ndarray, subtype: str, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="WAV", subtype=subtype)
    return file.getvalue()


def _mp3() -> bytes:
    return encode_sound(tone(1.0), 16_000, "MP3")


# 995 bytes, or 7 * 128 + 0x63: an ID3 tag counts in sevens of bits.
JUNK = bytes(range(1, 200)) * 5
THREE_HOURS = 3 * 3600 * 16_000

SOUNDS = [
    Hostile("sound of no samples", "wav", lambda: encode_sound(np.zeros(0), 16_000, "WAV"), "empty"),
    Hostile("sound of no bytes", "wav", lambda: b"", "decode"),
    Hostile("sound with NaN", "wav", lambda: float_wav([0.1, float("nan"), 0.2]), "decode"),
    Hostile("sound with an infinity", "wav", lambda: float_wav([0.1, float("-inf")]), "decode"),
    Hostile("flac with a header of three hours", "flac", lambda: flac_that_declares(THREE_HOURS), "size"),
    Hostile("flac with a header of a month", "flac", lambda: flac_that_declares((1 << 36) - 1), "size"),
    Hostile("flac with a header of two seconds", "flac", lambda: flac_that_declares(32_000), "decode"),
    Hostile("truncated flac", "flac", lambda: encode_sound(tone(1.5), 16_000)[:-4000], "decode"),
    Hostile("sound of 40 channels", "wav", lambda: encode_sound(tone(0.1, channels=40), 16_000, "WAV"), "size"),
    Hostile("sound at 500 Hz", "wav", lambda: encode_sound(tone(), 500, "WAV"), "size"),
    Hostile("text called flac", "flac", lambda: b"not a sound at all" * 100, "decode"),
    Hostile("aiff called wav", "wav", lambda: encode_sound(tone(), 16_000, "AIFF"), None),
    Hostile("wav with a header of three hours", "wav", lambda: wav_that_declares(2 * THREE_HOURS)),
    Hostile("8-bit wav", "wav", lambda: _sound(tone(), "PCM_U8")),
    Hostile("24-bit wav", "wav", lambda: _sound(tone(), "PCM_24")),
    Hostile("wav of 8 channels", "wav", lambda: _sound(tone(channels=8), "PCM_16")),
    Hostile("wav at 192 kHz", "wav", lambda: _sound(tone(rate=192_000), "PCM_16", 192_000)),
    Hostile("wav of one sample", "wav", lambda: _sound(np.array([0.5]), "PCM_16")),
    Hostile("wav louder than a float can be squared", "wav", lambda: float_wav([3e38, -3e38] * 4000, 44_100)),
    Hostile("flac called mp3", "mp3", lambda: encode_sound(tone(), 16_000)),
    Hostile("mp3 behind junk", "mp3", lambda: JUNK + _mp3(), "decode"),
    Hostile("mp3 behind a tag full of junk", "mp3", lambda: b"ID3\4\0\0\0\0\7\x63" + JUNK + _mp3()),
    Hostile("mp3 with junk inside", "mp3", lambda: _mp3()[:1500] + JUNK + _mp3()[1500:]),
    Hostile("truncated mp3", "mp3", lambda: _mp3()[:-700]),
]

TEXTS = [
    Hostile("text that is not UTF-8", "txt", lambda: b"caf\xe9", "encoding"),
    Hostile("text in UTF-16", "txt", lambda: "text".encode("utf-16"), "encoding"),
    Hostile("text with a NUL", "txt", lambda: b"a\0b", "encoding"),
    Hostile("text with half a surrogate", "txt", lambda: b"\xed\xa0\x80", "encoding"),
    Hostile("text of 10 MB", "txt", lambda: b"word " * 2_000_000, "size"),
    Hostile("text with a byte order mark", "txt", lambda: b"\xef\xbb\xbfcaption"),
    Hostile("text with a terminal's escapes", "txt", lambda: b"\x1b[2Jcaption \x07"),
    Hostile("text that names special tokens", "txt", lambda: b"<|image|> <eos> <pad>"),
    Hostile("empty text beside a picture", "txt", lambda: b""),
    Hostile("text of one long word", "txt", lambda: b"a" * 500_000),
]

METADATA = [
    Hostile("json nested 100,000 deep", "json", lambda: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "json"),
    Hostile("json that is a list", "json", lambda: b'["label", 3]', "json"),
    Hostile("json that is a number", "json", lambda: b"7", "json"),
    Hostile("json that is cut", "json", lambda: b'{"label": ', "json"),
    Hostile("json of no bytes", "json", lambda: b"", "json"),
    Hostile("json that is not UTF-8", "json", lambda: b'{"label": "\xff"}', "json"),
    Hostile("json with a number of 5,000 digits", "json", lambda: b'{"label": ' + b"9" * 5000 + b"}", "json"),
    Hostile("json with half a surrogate", "json", lambda: b'{"label_name": "\\ud800"}', "json"),
    Hostile("json of 2 MB", "json", lambda: json.dumps({"a": "x" * 2_000_000}).encode(), "size"),
    Hostile("json with NaN and infinities", "json", lambda: b'{"label": NaN, "b": -Infinity, "c": 1e999}'),
    Hostile("json with both halves of a surrogate", "json", lambda: b'{"label_name": "\\ud83d\\ude00"}'),
    Hostile("json with a number beyond 64 bits", "json", lambda: b'{"label": ' + b"9" * 40 + b"}"),
    Hostile("json with its name twice", "json", lambda: b'{"label": 1, "label": 2}'),
]

MEMBERS = [*IMAGES, *SOUNDS, *TEXTS, *METADATA]


# Members that run when they are read


class Runs:
    """Unpickling it creates a file: the proof that something was executed."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.witness,)


def pickled_members(witness: Path) -> dict[str, bytes]:
    """Extension -> bytes that create `witness` when what reads them unpickles."""
    array = io.BytesIO()
    np.save(array, np.array([Runs(witness)], dtype=object), allow_pickle=True)
    code = pickle.dumps(Runs(witness))
    return {"pkl": code, "pickle": code, "pyd": code, "pth": code, "pt": code, "npy": array.getvalue()}


# Tars


def entry(
    name: str | bytes, data: bytes = b"", kind: bytes = b"0", size: bytes | None = None, **fields: bytes
) -> bytes:
    """One ustar header with a sound checksum, and its data.

    `size` is the size field as it stands there, `at257=b"..."` what stands at byte 257.
    """
    header = bytearray(BLOCK)

    def put(place: int, value: bytes) -> None:
        header[place : place + len(value)] = value

    put(0, name if isinstance(name, bytes) else name.encode())
    put(100, b"0000644\0" + b"0000000\0" * 2)
    put(124, b"%011o\0" % len(data) if size is None else size)
    put(136, b"00000000000\0")
    put(156, kind)
    put(257, b"ustar\00000")
    for place, value in fields.items():
        put(int(place.removeprefix("at")), value)
    return with_checksum(bytes(header)) + data + bytes(-len(data) % BLOCK)


def with_checksum(header: bytes) -> bytes:
    """The header with the checksum that fits it."""
    total = sum(header[:148]) + 8 * 32 + sum(header[156:BLOCK])
    return header[:148] + b"%06o\0 " % total + header[156:]


def pax(**records: str) -> bytes:
    """A pax header for the member that follows."""
    body = b""
    for key, value in records.items():
        line = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(line) + 1
        while length != len(line) + len(str(length)):
            length = len(line) + len(str(length))
        body += str(length).encode() + line
    return entry("pax", body, b"x")


def long_name(name: str) -> bytes:
    """GNU's header for a long name."""
    return entry("././@LongLink", name.encode() + b"\0", b"L")


END = bytes(2 * BLOCK)
GOOD_BEFORE = entry("a.txt", b"the first") + entry("b.txt", b"the second")
GOOD_AFTER = entry("y.txt", b"the last but one") + entry("z.txt", b"the last")


@dataclass(frozen=True)
class HostileTar:
    """A tar with good samples a, b, y and z: the keys that stay, and (key, member, reason) of what does not."""

    name: str
    make: Callable[[], bytes]
    lines: tuple[tuple[str | None, str | None, str], ...]
    kept: tuple[str, ...] = ("a", "b", "y", "z")


def between(*entries: bytes) -> Callable[[], bytes]:
    """Entries between the good samples."""
    return lambda: GOOD_BEFORE + b"".join(entries) + GOOD_AFTER + END


def _flipped(name: str, place: int) -> Callable[[], bytes]:
    def make() -> bytes:
        bad = bytearray(entry(name, b"bad"))
        bad[place] ^= 0x55
        return between(bytes(bad))()

    return make


def _special(kind: bytes, reason: str) -> HostileTar:
    other = entry("m.txt", b"beside it")
    special = entry("m.jpg", b"", kind, at157=b"/etc/passwd")
    return HostileTar(f"{reason} (type {kind.decode()})", between(other, special), (("m", "m.jpg", reason),))


def _misnamed(label: str, name: str, key: str | None) -> HostileTar:
    return HostileTar(f"name: {label}", between(entry(name, b"bad")), ((key, name, "name"),))


def _missized(label: str, field: bytes, reason: str) -> HostileTar:
    return HostileTar(f"size: {label}", between(entry("m.jpg", b"bad", size=field)), (("m", "m.jpg", reason),))


def _old_sparse() -> bytes:
    sparse = b"%011o\0%011o\0" % (1 << 30, 0)
    return entry("m.jpg", b"", b"S", at386=sparse, at483=b"%011o\0" % (1 << 31), at257=b"ustar  \0")


_HUGE = b"\x80" + (1 << 70).to_bytes(11, "big")
_DEEP = "d" * 90 + "/" + "k" * 60

TARS = [
    HostileTar("checksum of a header", _flipped("m.jpg", 120), (("m", "m.jpg", "header"),)),
    HostileTar("checksum of a header whose name is damaged", _flipped("m.jpg", 0), (("8", "8.jpg", "header"),)),
    HostileTar("old sparse member", between(_old_sparse()), (("m", "m.jpg", "sparse"),)),
    HostileTar(
        "pax sparse member",
        between(pax(GNU__sparse__major="1", GNU__sparse__realsize=str(1 << 31)), entry("m.jpg", b"1\n0\n")),
        (("m", "m.jpg", "sparse"),),
    ),
    _special(b"1", "link"),
    _special(b"2", "link"),
    _special(b"3", "device"),
    _special(b"4", "device"),
    _special(b"6", "fifo"),
    HostileTar("a type that nobody knows", between(entry("m.jpg", b"bad", b"Z")), (("m", "m.jpg", "type"),)),
    HostileTar("a tape's label", between(entry("label", b"", b"V")), ((None, "label", "type"),)),
    _misnamed("absolute", "/etc/m.jpg", "/etc/m"),
    _misnamed("up", "../m.jpg", "../m"),
    _misnamed("up from within", "x/../../m.jpg", "x/../../m"),
    _misnamed("bell", "m\x07.jpg", "m\x07"),
    _misnamed("line end", "m\n.jpg", "m\n"),
    _misnamed("backslash", "x\\m.jpg", "x\\m"),
    HostileTar("name: not UTF-8", between(entry(b"\xff\xfe.jpg", b"bad")), ((None, None, "name"),)),
    HostileTar(
        "name: longer than a path may be",
        between(long_name("k" * 5000 + ".jpg"), entry("k", b"bad")),
        ((None, "k" * 4096, "name"),),
    ),
    HostileTar(
        "name: GNU and pax disagree",
        between(long_name("m.jpg"), pax(path="n.jpg"), entry("m.jpg", b"bad")),
        (("n", "n.jpg", "name"),),
    ),
    HostileTar(
        "name: GNU and pax agree",
        between(long_name(f"{_DEEP}.txt"), pax(path=f"{_DEEP}.txt"), entry("d", b"good")),
        (),
        ("a", "b", _DEEP, "y", "z"),
    ),
    HostileTar("name: a folder that holds data", between(entry("d/", entry("m.txt", b"inner"))), ()),
    _missized("2 to the 70th in base 256", _HUGE, "truncated"),
    _missized("four gigabytes in octal", b"%011o\0" % (1 << 32), "truncated"),
    _missized("negative in base 256", b"\xff" * 12, "header"),
    _missized("negative in octal", b"-0000002000\0", "header"),
    _missized("with an underscore", b"0000_000003\0", "header"),
    _missized("with a prefix", b"0o000000003\0", "header"),
    _missized("no number at all", b"bigbigbigbig", "header"),
    HostileTar(
        "size: pax says another, of 5,000 digits",
        between(pax(size="9" * 5000), entry("m.jpg", b"bad")),
        (("m", "m.jpg", "header"),),
    ),
    HostileTar(
        "size: pax says a negative one",
        between(pax(size="-512"), entry("m.jpg", b"bad")),
        (("m", "m.jpg", "header"),),
    ),
    HostileTar("pax record that does not fit", between(entry("p", b"999 path=x\n", b"x")), ((None, None, "header"),)),
    HostileTar("pax header of 2 MB", between(entry("p", bytes(2 << 20), b"x")), ((None, None, "header"),)),
    HostileTar(
        "pax header that renames all that follow",
        between(entry("g", b"14 path=m.jpg\n", b"g")),
        ((None, None, "header"),),
    ),
    HostileTar(
        "two members of one name",
        between(entry("m.txt", b"1"), entry("m.txt", b"2")),
        (("m", "m.txt", "duplicate"),),
    ),
    HostileTar("sample of metadata alone", between(entry("m.json", b"{}")), (("m", None, "empty"),)),
    HostileTar("sample of an empty text", between(entry("m.txt", b"")), (("m", None, "empty"),)),
    HostileTar("zeros in the middle", between(bytes(4 * BLOCK)), ((None, None, "zeroed"),)),
    HostileTar("no end marker", lambda: GOOD_BEFORE + GOOD_AFTER, ((None, None, "truncated"),)),
]


def pickle_tar(witness: Path) -> HostileTar:
    """Samples of a text and of each kind of pickle; they stay, and each pickle has a line."""
    members = pickled_members(witness)
    entries = [entry(f"k-{kind}.txt", b"beside it") + entry(f"k-{kind}.{kind}", data) for kind, data in members.items()]
    numbers = io.BytesIO()
    np.save(numbers, np.arange(3))
    entries.append(entry("n.txt", b"beside numbers") + entry("n.npy", numbers.getvalue()))
    lines = tuple((f"k-{kind}", f"k-{kind}.{kind}", "pickle") for kind in members)
    kept = ("a", "b", *(f"k-{kind}" for kind in members), "n", "y", "z")
    return HostileTar("pickles beside texts", between(*entries), lines, kept)


# A dataset of them all


def corpus_tar(path: Path, cases: Iterable[Hostile], twin: bool = False) -> list[str]:
    """A tar in which good samples and hostile ones take turns; returns the keys. In its `twin` all are good."""
    keys: list[str] = []
    with tarfile.open(path, "w") as tar:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

        picture = encode_image(pixels(28, 28))
        for number, case in enumerate(cases):
            keys += [f"good-{number:03d}", f"hostile-{number:03d}"]
            add(f"{keys[-2]}.txt", f"the number {number}".encode())
            add(f"{keys[-2]}.png", picture)
            if case.extension == "txt":
                add(f"{keys[-1]}.png", picture)
            else:
                add(f"{keys[-1]}.txt", b"a caption")
            if not twin:
                add(f"{keys[-1]}.{case.extension}", case.make())
    return keys
