"""The preview page as text: whole in itself, small, true to the samples. A browser opens it in test_preview_page."""

from __future__ import annotations

import base64
import io
import re
import tarfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_pipelines.dataset import index_folder, open_dataset
from data_pipelines.errors import BadInput
from data_pipelines.preview import choose, write_preview
from data_pipelines.report import info
from tests.data_pipelines.hostile_preview import SCRIPT, make_hostile
from tests.data_pipelines.tuples import tuple_sample


class Page(HTMLParser):
    """Elements by name, and the text of each one of `told`."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: dict[str, list[dict[str, str | None]]] = {}
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.setdefault(tag, []).append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def contents(elements: list[dict[str, str | None]], kind: str) -> list[bytes]:
    found = [str(element["src"]) for element in elements]
    prefix = f"data:{kind};base64,"
    return [base64.b64decode(address.removeprefix(prefix)) for address in found if address.startswith(prefix)]


@pytest.fixture
def page(make_dataset: Callable[..., Path], tmp_path: Path) -> str:
    keys = write_preview(make_hostile(make_dataset), tmp_path / "page.html", progress=False)
    assert len(keys) == 8
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_pictures_sounds_and_spectrograms_are_inside(page: str) -> None:
    parsed = Page(page)
    photos = contents(parsed.elements["img"], "image/jpeg")
    assert [Image.open(io.BytesIO(photo)).size for photo in photos] == [(320, 213)]
    pngs = [Image.open(io.BytesIO(data)) for data in contents(parsed.elements["img"], "image/png")]
    assert [png.size for png in pngs].count((28, 28)) == 5
    assert sorted(png.height for png in pngs) == [28] * 5 + [64] * 7
    original = np.asarray(Image.open(io.BytesIO(tuple_sample(1).image or b"")).convert("RGB"))
    assert any(png.size == (28, 28) and np.array_equal(np.asarray(png), original) for png in pngs)
    sounds = contents(parsed.elements["audio"], "audio/mpeg")
    assert len(sounds) == 7
    wave, rate = soundfile.read(io.BytesIO(sounds[0]))
    assert rate == 8000 and len(wave) / rate == pytest.approx(0.375, abs=0.1) and np.abs(wave).max() > 0.2


def test_foreign_text_is_text(page: str) -> None:
    parsed = Page(page)
    assert len(parsed.elements["script"]) == 1 and len(parsed.elements["article"]) == 8
    assert "i" not in parsed.elements and "u" not in parsed.elements and "b" not in parsed.elements
    assert SCRIPT in parsed.text and "{{ 7 * 7 }} &lt;b&gt;" in parsed.text and "<i>name</i>" in parsed.text
    assert all("onerror" not in element for element in parsed.elements["img"])


def test_nothing_is_asked_of_anybody(page: str) -> None:
    parsed = Page(page)
    assert "link" not in parsed.elements and "iframe" not in parsed.elements
    addresses = [e.get("src") or "" for kind in ("img", "audio", "script") for e in parsed.elements[kind]]
    assert all(address == "" or address.startswith("data:") for address in addresses)
    assert not re.search(r"https?:|url\(|@import", re.sub(r'src="data:[^"]*"', "", page))
    [policy] = [e["content"] for e in parsed.elements["meta"] if e.get("http-equiv") == "Content-Security-Policy"]
    assert (
        policy and policy.startswith("default-src 'none'; img-src data:; media-src data:;") and "unsafe" not in policy
    )


def test_what_does_not_decode_is_said(page: str) -> None:
    assert "image: format: not a JPEG, PNG or WEBP" in Page(page).text


def test_a_lone_surrogate_is_told_and_never_written(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.USTAR_FORMAT) as file:
        for name, data in (("a.txt", b"a text"), ("a.json", rb'{"label": "\ud800"}')):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            file.addfile(header, io.BytesIO(data))
    index_folder(tmp_path)
    write_preview(tmp_path, tmp_path / "page.html", progress=False)
    assert r"\ud800" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert info(tmp_path)["labels"] == {}


def test_the_page_is_small_and_the_same_again(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_hostile(make_dataset)
    for name in ("a.html", "b.html"):
        write_preview(folder, tmp_path / name, progress=False)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "a.html").stat().st_size < 200_000


def test_samples_are_spread_evenly_or_drawn_with_a_seed(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_dataset(sizes=(20, 21))
    even = write_preview(folder, tmp_path / "a.html", samples=5, progress=False)
    assert even == [f"sample-{number:05d}" for number in (0, 10, 20, 30, 40)]
    assert "5 of them, spread evenly." in (tmp_path / "a.html").read_text(encoding="utf-8")
    drawn = [write_preview(folder, tmp_path / "b.html", samples=5, seed=seed, progress=False) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and all(len(set(keys)) == 5 for keys in drawn)
    assert "5 of them, drawn at random with seed 2." in (tmp_path / "b.html").read_text(encoding="utf-8")
    assert choose(3, 10, None).tolist() == choose(3, 10, 0).tolist() == [0, 1, 2]
    huge = choose(10**9, 4, 0)
    assert len(np.unique(huge)) == 4 and huge.max() < 10**9


def test_bad_input_writes_nothing(make_dataset: Callable[..., Path], tmp_path: Path) -> None:
    dataset = open_dataset(make_dataset(sizes=(2,)))
    with pytest.raises(BadInput, match="is a folder"):
        write_preview(dataset, tmp_path, progress=False)
    with pytest.raises(BadInput, match="give 1 or more"):
        write_preview(dataset, tmp_path / "page.html", samples=0, progress=False)
    (dataset.path / "shards/dataset-000000.tar").unlink()
    with pytest.raises(BadInput, match="cannot be opened"):
        write_preview(dataset, tmp_path / "page.html", progress=False)
    assert not list(tmp_path.glob("*.html"))
