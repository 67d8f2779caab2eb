"""The page: whole in itself, safe against what samples say, and true to the numbers."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_pipelines.config import AudioConfig
from data_pipelines.shard import Sample
from pretrain.charts import line_chart, nice_ticks, running_mean
from pretrain.report import Group, Report, example, read_metrics, write_report

AUDIO = AudioConfig(sampling_rate=8000, mel_bins=20)


def picture(side: int = 28) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 60)).save(file, format="PNG")
    return file.getvalue()


def tone(hertz: float, seconds: float = 0.5) -> bytes:
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(8000 * seconds)) / 8000)
    file = io.BytesIO()
    soundfile.write(file, wave, 8000, format="FLAC")
    return file.getvalue()


def results() -> dict[str, Any]:
    scores = {"R@1": 0.5, "R@5": 0.75, "R@10": 1.0, "chance_R@1": 0.1, "num_queries": 20, "num_candidates": 10}
    retrieval: dict[str, Any] = {f"{a}_to_{b}": scores for a, b in [("image", "audio"), ("audio", "image")]}
    retrieval |= {"image_to_text": None, "image_to_text_class_p1": None}
    retrieval |= {"image_to_audio_class_p1": 0.625, "audio_to_image_class_p1": 0.375}
    return {
        "zero_shot": {
            "classes": ["a", "b", "c", "d"],
            "image_top1": 0.8125,
            "audio_top1": None,
            "num_images": 16,
            "num_sounds": 0,
        },
        "retrieval": retrieval,
        "caption": {
            "loss": 1.25,
            "num_texts": 9,
            "loss_by_seen": {"both": None, "image": 1.125, "audio": None, "none": 2.0},
            "num_texts_by_seen": {"both": 0, "image": 8, "audio": 0, "none": 9},
        },
        "num_samples": 20,
        "data": {"name": "test <data>"},
    }


class Page(HTMLParser):
    """Collects every address and the text, and checks that elements are closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.addresses += [
            value for name, value in attrs if name in ("src", "href", "action", "data", "poster", "srcset")
        ]
        if tag not in ("meta", "img", "br", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "img", "br", "line", "circle", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += f" {data}"


@pytest.fixture
def page(tmp_path) -> tuple[str, Page]:
    metrics = [
        {"step": s, "samples_seen": 8 * s, "step_seconds": 0.5, "loss": 5 / s, "loss_text": None, "lr": 1e-3 * s}
        for s in range(1, 60)
    ]
    nasty = '<script>alert("1")</script>'
    samples = [
        Sample("one", image=picture(), text=nasty, audio=tone(440), image_extension="png", audio_extension="flac"),
        Sample("two", text="only a text"),
        Sample("three", image=b"not an image", audio=b"not a sound", text=None),
    ]
    shown = [example(sample, AUDIO, [("text", sample.text)]) for sample in samples]
    report = Report(
        name="demo & co",
        subtitle="a run",
        metrics=metrics,
        results=results(),
        groups=[Group("Samples", "note", shown), Group("Empty", "nothing", [])],
        facts={"seed": "0"},
        verification=(True, "verified with transformers alone"),
    )
    write_report(report, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    return html, Page(html)


def test_it_asks_nobody_for_anything_and_runs_no_script(page):
    html, parsed = page
    assert parsed.addresses and all(address.startswith("data:") for address in parsed.addresses)
    assert "<script" not in html and "url(" not in html and "@import" not in html
    assert parsed.open == []


def test_what_a_sample_says_is_text_not_markup(page):
    assert '<script>alert("1")</script>' in page[1].text
    assert "&lt;script&gt;" in page[0]
    assert "test <data>" in page[1].text and "demo & co" in page[1].text


def test_picture_spectrogram_and_sound_are_inside(page):
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page[0])
    assert len(images) == 2
    assert [Image.open(io.BytesIO(base64.b64decode(data))).size for data in images] == [(28, 28), (240, 96)]
    sound = re.search(r'<audio[^>]*src="data:audio/flac;base64,([^"]+)"', page[0])
    assert soundfile.read(io.BytesIO(base64.b64decode(sound[1])))[1] == 8000
    assert page[0].count("<audio") == 1 and page[1].text.count("no picture") == 2


def test_the_numbers_are_there(page):
    text = " ".join(page[1].text.split())
    for number in ("81.2 %", "62.5 %", "1.250", "1.125", "25.0 %", "Training", "59", "30 s"):
        assert number in text, number
    assert "Empty" not in text and "sounds named" not in text and "nothing 2.000 9" in text


def test_without_anything_there_is_still_a_page(tmp_path):
    write_report(Report(name="nothing yet"), tmp_path / "report.html")
    assert Page((tmp_path / "report.html").read_text()).open == []


def test_a_chart_is_well_formed_and_in_its_box():
    values = [math.nan, 3.0, 2.0, math.inf, 1.5, 1.0]
    svg = ElementTree.fromstring(str(line_chart(range(6), values, 'loss "x" <y>')))
    points = [
        tuple(map(float, pair.split(","))) for line in svg.iter("polyline") for pair in line.attrib["points"].split()
    ]
    assert len(points) == 8
    assert all(0 <= x <= 420 and 0 <= y <= 200 for x, y in points)
    assert points[0][1] < points[3][1], "3.0 is drawn above 1.0"
    assert svg.find("title").text.startswith('loss "x" <y>: 1')
    assert "no values" in line_chart([1, 2], [math.nan, math.nan], "loss")
    ElementTree.fromstring(str(line_chart([7], [2.5], "one point")))


def test_ticks_and_means():
    assert nice_ticks(0, 10) == [0, 5, 10]
    assert nice_ticks(0.11, 0.49) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert nice_ticks(3, 3) == [3]
    assert running_mean(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist() == [1, 2, 4, 6]


def test_metrics_of_a_resumed_run_count_each_step_once(tmp_path):
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 2.5}, {"step": 3, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "lo')
    assert [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [3.0, 2.5, 1.0]
    assert read_metrics(tmp_path / "none.jsonl") == []
