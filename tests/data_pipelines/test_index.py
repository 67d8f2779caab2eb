"""The index tells the truth about good tars and never keeps a part of a sample from a bad one.

What strangers may put into a tar, case by case, is in test_hostile.py.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_pipelines.errors import BadInput
from data_pipelines.headers import image_size
from data_pipelines.index import COLUMN_TYPES, ShardIndex, index_shard
from data_pipelines.shard import write_shard
from data_pipelines.tar import BLOCK
from tests.data_pipelines.tuples import encode_image, tuple_sample

MIXED = ["", "audio", "", "image", "", "text", "", ""]


def members_of(path: Path) -> dict[str, dict[str, bytes]]:
    """Key -> member -> bytes, as the index finds them."""
    index, raw = index_shard(path), path.read_bytes()
    found: dict[str, dict[str, bytes]] = {}
    for row, key in enumerate(index.keys()):
        assert key not in found
        spans = {m: (int(index[f"{m}_offset"][row]), int(index[f"{m}_size"][row])) for m in ("image", "text", "audio")}
        found[key] = {m: raw[offset : offset + size] for m, (offset, size) in spans.items() if size >= 0}
    return found


@pytest.fixture(params=["equal", "mixed"])
def tar(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Eight samples: all with three modalities, or some with two."""
    missing = MIXED if request.param == "mixed" else [""] * 8
    path = tmp_path / "shard.tar"
    write_shard((tuple_sample(n, missing=what) for n, what in enumerate(missing)), path)
    return path


def test_every_member_is_found(tar: Path) -> None:
    index = index_shard(tar)
    assert index.quarantined == ()
    for row, (key, found) in enumerate(members_of(tar).items()):
        sample = tuple_sample(row)
        assert key == sample.key
        whole = {"image": sample.image, "text": (sample.text or "").encode(), "audio": sample.audio}
        assert len(found) >= 2 and all(whole[modality] == data for modality, data in found.items())
    total = sum(len(found) for found in members_of(tar).values())
    assert total == sum(index.count(modality) for modality in ("image", "text", "audio"))
    there = index["image_size"] >= 0
    assert (index["width"][there] == 28).all() and (index["width"][~there] == 0).all()
    there = index["audio_size"] >= 0
    lengths = np.array([(3000 + 40 * n) / 8000 for n in range(8)], dtype=np.float32)
    np.testing.assert_allclose(index["audio_seconds"], np.where(there, lengths, 0), rtol=1e-6)


def test_save_and_load(tar: Path, tmp_path: Path) -> None:
    index = index_shard(tar)
    index.save(tmp_path / "x.arrow", 123, "ab")
    loaded = ShardIndex.load(tmp_path / "x.arrow")
    assert (loaded.keys(), loaded.num_bytes, loaded.sha256) == (index.keys(), 123, "ab")
    np.testing.assert_array_equal(loaded["text_offset"], index["text_offset"])
    for content in (b"", b"ARROW1 nonsense", (tmp_path / "x.arrow").read_bytes()[:-30]):
        (tmp_path / "bad.arrow").write_bytes(content)
        with pytest.raises(BadInput, match="bad.arrow"):
            ShardIndex.load(tmp_path / "bad.arrow")
        with pytest.raises(BadInput, match=r"^https://host/x\.arrow: not an index"):
            ShardIndex.parse(content, "https://host/x.arrow")


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("image_extension", 4),
        ("audio_extension", -1),
        ("text_offset", -1),
        ("image_size", -2),
        ("audio_seconds", float("nan")),
        ("audio_seconds", -1.0),
        ("width", -5),
    ],
)
def test_values_that_no_tar_gives_are_refused(tar: Path, tmp_path: Path, column: str, value: float) -> None:
    index_shard(tar).save(tmp_path / "x.arrow", 123, "ab")
    with pa.ipc.open_file(tmp_path / "x.arrow") as file:
        table = file.read_all()
    place = table.schema.get_field_index(column)
    values = [*table.column(place).to_pylist()[1:], value]
    changed = table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))
    ShardIndex(changed).save(tmp_path / "x.arrow", 123, "ab")
    with pytest.raises(BadInput, match=rf"x\.arrow: not an index \({column} {value}\)"):
        ShardIndex.load(tmp_path / "x.arrow")


def test_an_index_that_lies_about_its_bytes_is_refused(tar: Path, tmp_path: Path) -> None:
    index_shard(tar).save(tmp_path / "x.arrow", 123, "ab")
    raw = (tmp_path / "x.arrow").read_bytes()
    with pa.ipc.open_file(tmp_path / "x.arrow") as file:
        table = file.read_all()
    small = [pa.array(np.zeros(1 << 20, kind)) for kind in COLUMN_TYPES.values()]
    many = pa.Table.from_arrays([pa.array([""] * (1 << 20)), *small], schema=table.schema)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(tmp_path / "bomb.arrow", table.schema, options=options) as writer:
        writer.write_table(many)
    lies = {
        "bomb": ((tmp_path / "bomb.arrow").read_bytes(), "a compressed part"),
        "key": (raw.replace(b"sample-00003", b"sample-\xff\xff003"), "UTF8"),
        "hash": (raw.replace(b"\2\0\0\0ab", b"\2\0\0\0\xff\xff"), "utf-8"),
        "count": (raw.replace(b"\3\0\0\x00123", b"\3\0\0\x00x23"), "invalid literal"),
    }
    assert len(lies["bomb"][0]) < 100_000
    for name, (content, message) in lies.items():
        assert content != raw, name
        (tmp_path / f"{name}.arrow").write_bytes(content)
        before = pa.total_allocated_bytes()
        with pytest.raises(BadInput, match=rf"{name}\.arrow: not an index \(.*{message}"):
            ShardIndex.load(tmp_path / f"{name}.arrow")
        assert pa.total_allocated_bytes() - before < 1 << 20


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("image_extension", 4),
        ("audio_extension", -1),
        ("width", -1),
        ("audio_seconds", np.nan),
        ("audio_seconds", np.inf),
    ],
)
def test_an_index_with_values_that_no_tar_gives(tar: Path, tmp_path: Path, column: str, value: float) -> None:
    index_shard(tar).save(tmp_path / "x.arrow", 5, "ab")
    table = pa.ipc.open_file(tmp_path / "x.arrow").read_all()
    field = table.schema.field(column)
    changed = pa.array([value] * table.num_rows, field.type)
    table = table.set_column(table.schema.get_field_index(column), field, changed)
    with pa.ipc.new_file(str(tmp_path / "y.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(BadInput, match=f"y.arrow: not an index \\({column} "):
        ShardIndex.load(tmp_path / "y.arrow")


def test_every_cut_keeps_whole_samples_only(tar: Path, tmp_path: Path) -> None:
    truth, raw, cut_file = members_of(tar), tar.read_bytes(), tmp_path / "cut.tar"
    index = index_shard(tar)
    ends = {
        key: max(int(index[f"{m}_offset"][row] + index[f"{m}_size"][row]) for m in ("image", "text", "audio", "json"))
        for row, key in enumerate(index.keys())
    }
    end_of_data = max(ends.values())
    for cut in range(BLOCK, end_of_data + 2 * BLOCK, BLOCK // 2):
        cut_file.write_bytes(raw[:cut])
        kept, quarantined = members_of(cut_file), index_shard(cut_file).quarantined
        assert all(truth[key] == members for key, members in kept.items()), cut
        whole = [key for key, end in ends.items() if end <= cut]
        # The one just before the cut may be given up where it could be the beginning of a longer one.
        assert set(whole[:-1]) <= set(kept) <= set(whole), cut
        assert quarantined or len(kept) == 8, cut


def test_cuts_between_equal_samples_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(map(tuple_sample, range(4)), path)
    raw, index = path.read_bytes(), index_shard(path)
    next_start = int(index["audio_offset"][3]) - BLOCK
    path.write_bytes(raw[:next_start])
    assert index_shard(path).keys() == index.keys()[:3]
    assert [line.reason for line in index_shard(path).quarantined] == ["truncated"]


def test_flipped_header_bytes_cost_one_sample(tar: Path, tmp_path: Path) -> None:
    truth, raw, bad_file = members_of(tar), tar.read_bytes(), tmp_path / "bad.tar"
    with tarfile.open(tar) as opened:
        headers = [member.offset for member in opened]
    random = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(raw)
        bad[int(random.choice(headers)) + int(random.integers(BLOCK))] ^= 1 << int(random.integers(8))
        bad_file.write_bytes(bad)
        kept, quarantined = members_of(bad_file), index_shard(bad_file).quarantined
        assert all(truth[key] == members for key, members in kept.items())
        assert quarantined and len(kept) >= 6


def test_flipped_header_bytes_of_equal_samples_cost_exactly_one(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(map(tuple_sample, range(5)), path)
    raw = path.read_bytes()
    with tarfile.open(path) as opened:
        header = next(m.offset for m in opened if m.name == "sample-00002.png")
    for byte in (0, 100, 124, 136, 148, 156, 257, 400):
        bad = bytearray(raw)
        bad[header + byte] ^= 0x55
        path.write_bytes(bad)
        index = index_shard(path)
        assert index.keys() == [f"sample-{n:05d}" for n in (0, 1, 3, 4)], byte
        assert [line.key for line in index.quarantined] == ["sample-00002"]


def test_a_zeroed_page_does_not_end_the_tar(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(map(tuple_sample, range(6)), path)
    truth, raw = members_of(path), bytearray(path.read_bytes())
    with tarfile.open(path) as opened:
        header = next(m.offset for m in opened if m.name == "sample-00002.flac")
        end = next(m.offset for m in opened if m.name == "sample-00003.png")
    raw[header:end] = bytes(end - header)
    path.write_bytes(raw)
    with tarfile.open(path) as opened:
        assert len(opened.getmembers()) == 8, "tarfile itself stops here"
    kept, quarantined = members_of(path), index_shard(path).quarantined
    assert set(kept) == {f"sample-{n:05d}" for n in (0, 1, 4, 5)}
    assert all(truth[key] == members for key, members in kept.items())
    assert {"zeroed"} == {line.reason for line in quarantined}


def hostile_tar(path: Path, *members: tarfile.TarInfo | tuple[str, bytes], **options: object) -> None:
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[arg-type]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))


def test_duplicates_folders_and_strangers(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    folder = tarfile.TarInfo("d/")
    folder.type = tarfile.DIRTYPE
    hostile_tar(
        path,
        folder,
        ("d/a.TXT", b"x"),
        ("d/b.txt", b"x"),
        ("d/b.txt", b"y"),
        ("noextension", b"x"),
        ("d/c.json", b"{}"),
        ("d/e.png", b"1"),
        ("d/e.jpg", b"2"),
        ("d/e.cls", b"3"),
    )
    index = index_shard(path)
    assert index.keys() == ["d/a", "d/e"]
    assert int(index["image_extension"][1]) == 0, "jpg is taken before png"
    assert [(line.key, line.reason) for line in index.quarantined] == [("d/b", "duplicate"), ("d/c", "empty")]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_of_other_writers(tmp_path: Path, tar_format: int) -> None:
    path, long = tmp_path / "a.tar", "d" * 90 + "/" + "k" * 60
    hostile_tar(path, (f"{long}.txt", b"x"), (f"{long}.jpg", b"y"), ("z.txt", b"z"), format=tar_format)
    assert index_shard(path).keys() == [long, "z"]
    assert index_shard(path).quarantined == ()


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("shape", [(1, 1), (37, 61), (300, 200)])
def test_image_headers(image_format: str, shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    options = {
        "PNG": [{}],
        "JPEG": [{}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(300)}],
        "WEBP": [{}, {"lossless": True}, {"exif": b"Exif\0\0" + bytes(300)}],
    }
    for option in options[image_format]:
        data = encode_image(pixels, image_format, **option)
        assert image_size(data) == (image_format, shape[1], shape[0])
        for cut in range(min(len(data), 64)):
            image_size(data[:cut])
    assert image_size(b"GIF89a" + bytes(30)) is None
