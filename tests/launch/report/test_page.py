"""The page: whole in itself, safe against what samples say, and true to the numbers."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_pipelines.config import AudioConfig
from data_pipelines.shard import Sample
from launch.report.charts import chart, log_ticks, nice_ticks
from launch.report.curves import Curve, Table, centred_mean, curve
from launch.report.of_run import write_run_report
from launch.report.page import Page, differences, write_page
from launch.report.timeline import Stretch, timeline
from launch.status.events import Event
from pretrain.examples import Group, example

NASTY = '<script>alert("1")</script>'
VOID = ("meta", "img", "br", "line", "circle", "polyline", "polygon", "rect")
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


class Parsed(HTMLParser):
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
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += f" {data}"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with 59 steps, two starts and an odd step, as the run itself would leave it."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(
        f"run: {{dir: {run}, name: 'demo & co <i>'}}\ndata: {{train: nowhere, global_batch: 8}}\n"
        "train: {max_steps: 60, warmup_steps: 1}\n"
    )
    begin = time.time() - 1000
    records = [
        {"step": s, "time": begin + s, "samples_seen": 8 * s, "step_seconds": 0.5, "loss": 5 / s, "loss_text": None}
        | {"lr": 1e-3 * s, "data_wait_fraction": 0.25, "samples_per_second": 16.0, "rss_bytes": 2**30, "epoch": s / 10}
        for s in range(1, 60)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    starts = [{"time": begin, "step": 0, "host": "a"}, {"time": begin + 30.5, "step": 30, "host": "<u>b"}]
    changes = [{"field": "train.learning_rate", "old": 0.1, "new": "</script><script>alert(2)", "step": 30}]
    (run / "run.json").write_text(
        json.dumps({"starts": starts, "world_sizes": [2, 1], "versions": {"torch": "1.2.3"}, "changes": changes})
    )
    incident = {"kind": "loss_spike", "rank": 1, "step": 12, "time": begin + 12, "reason": NASTY, "action": "skip"}
    (run / "incident-20260101T000000-loss_spike-step-00000012.json").write_text(json.dumps(incident))
    return run


@pytest.fixture
def page(run: Path) -> tuple[str, Parsed]:
    samples = [
        Sample("one", image=picture(), text=NASTY, audio=tone(440), image_extension="png", audio_extension="flac"),
        Sample("two", text="only a text"),
        Sample("three", image=b"not an image", audio=b"not a sound", text=None),
    ]
    shown = [example(sample, AUDIO, [("text", sample.text)]) for sample in samples]
    write_run_report(
        run,
        run / "report.html",
        groups=[Group("Samples", "note", shown), Group("Empty", "nothing", [])],
        verification=(True, "verified with transformers alone"),
        results=results(),
        more_facts=[("seed", "0")],
    )
    html = (run / "report.html").read_text()
    return html, Parsed(html)


def test_it_asks_nobody_for_anything_and_runs_its_own_script_alone(page: tuple[str, Parsed]) -> None:
    html, parsed = page
    assert parsed.addresses and all(address.startswith(("data:", "#")) for address in parsed.addresses)
    assert "url(" not in html and "@import" not in html and "http://" not in html and "https://" not in html
    assert len(re.findall("<script", html)) == 2 and "default-src 'none'" in html and "unsafe" not in html
    assert parsed.open == []


def test_what_others_say_is_text_not_markup(page: tuple[str, Parsed]) -> None:
    assert page[1].text.count(NASTY) == 3, "of a sample, and of an incident in two places"
    assert "</script><script>alert(2)" in page[1].text
    assert "test <data>" in page[1].text and "demo & co <i>" in page[1].text


def test_picture_spectrogram_and_sound_are_inside(page: tuple[str, Parsed]) -> None:
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page[0])
    assert [Image.open(io.BytesIO(base64.b64decode(data))).size for data in images] == [(28, 28), (240, 96)]
    sound = re.search(r'<audio[^>]*src="data:audio/flac;base64,([^"]+)"', page[0])
    assert sound is not None and soundfile.read(io.BytesIO(base64.b64decode(sound[1])))[1] == 8000
    assert page[0].count("<audio") == 1 and page[1].text.count("no picture") == 2


def test_the_numbers_are_there(page: tuple[str, Parsed]) -> None:
    text = " ".join(page[1].text.split())
    for number in ("81.2 %", "62.5 %", "1.250", "1.125", "25.0 %", "59", "30 s", "torch 1.2.3", "2 then 1", "seed 0"):
        assert number in text, number
    assert "Empty" not in text and "sounds named" not in text and "nothing 2.000 9" in text
    assert "train.max_steps 60" in text and "restart; 1 odd step" in text
    # 29.5 of some 59 seconds were steps.
    assert "50 % of the time went into steps that count" in text


def test_without_anything_there_is_still_a_page(tmp_path: Path) -> None:
    write_page(Page(name="nothing yet"), tmp_path / "report.html")
    assert Parsed((tmp_path / "report.html").read_text()).open == []
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(f"run: {{dir: {run}}}\ndata: {{train: nowhere}}\n")
    write_run_report(run, tmp_path / "run.html")
    parsed = Parsed((tmp_path / "run.html").read_text())
    assert parsed.open == [] and "nothing has started yet" in parsed.text


def test_a_chart_is_well_formed_and_in_its_box() -> None:
    values = np.array([math.nan, 3.0, 2.0, math.inf, 1.5, 1.0])
    drawn = chart(curve(np.arange(6.0), values), 'loss "x" <y>')
    assert drawn is not None and drawn.latest == "1"
    svg = ElementTree.fromstring(str(drawn.svg))
    pairs = [pair for each in svg.iter("polyline") for pair in each.attrib["points"].split()]
    points = [tuple(map(float, pair.split(","))) for pair in pairs]
    assert len(points) == 8 and all(0 <= x <= 270 and 0 <= y <= 165 for x, y in points)
    assert points[0][1] < points[3][1], "3.0 is drawn above 1.0"
    assert svg.attrib["aria-label"].startswith('loss "x" <y>: 1 at step 5')
    assert chart(curve(np.array([1.0, 2.0]), np.array([math.nan, math.nan])), "loss") is None
    alone = chart(curve(np.array([7.0]), np.array([2.5])), "one point", marks=[(7.0, "start")])
    assert alone is not None and ElementTree.fromstring(str(alone.svg)) is not None


def test_a_spike_neither_vanishes_nor_flattens_the_rest() -> None:
    steps = np.arange(1.0, 300_001)
    values = 1 + np.sin(steps / 1e4) ** 2
    values[123_456] = 400.0
    found = curve(steps, values, 500)
    assert found is not None and len(found.steps) <= 500 and found.thinned and found.num_values == 300_000
    assert found.high.max() == 400 and found.low.min() == pytest.approx(1, abs=1e-3)
    assert (np.diff(found.steps) > 0).all() and found.steps[-1] == 300_000
    drawn = chart(found, "loss")
    assert drawn is not None and drawn.note == "up to 400"
    wide = chart(found, "loss", wide=True)
    assert wide is not None and wide.note == "1 point above, up to 400"
    assert (
        max(
            float(text.text) for text in ElementTree.fromstring(str(drawn.svg)).iter("text") if "." in (text.text or "")
        )
        < 10
    )
    assert len(str(drawn.svg)) < 40_000


def test_what_a_thinned_curve_keeps() -> None:
    steps = np.array([1.0, 2, 3, 4, 100, 101, 102, 103])
    found = curve(steps, np.array([1.0, 3, 5, 7, 2, 2, 8, 4]), 4)
    assert isinstance(found, Curve)
    assert found.steps.tolist() == [4, 103] and found.mean.tolist() == [4, 4]
    assert (found.low.tolist(), found.high.tolist()) == ([1, 2], [7, 8])


def test_a_logarithmic_scale_where_values_spread() -> None:
    steps = np.arange(1.0, 101)
    drawn = chart(curve(steps, 10 / steps), "loss", log=8)
    assert drawn is not None and drawn.note == "log"
    assert [text.text for text in ElementTree.fromstring(str(drawn.svg)).iter("text")][:3] == ["0.1", "0.2", "0.5"]
    flat = chart(curve(steps, 2 + steps / 100), "loss", log=8)
    assert flat is not None and flat.note == ""
    zeros = chart(curve(steps, np.where(steps < 50, 0.0, 100.0)), "loss", log=8)
    assert zeros is not None and zeros.note == "", "0 has no logarithm"


def test_ticks_and_means() -> None:
    assert nice_ticks(0, 10) == [0, 5, 10]
    assert nice_ticks(0.11, 0.49) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert nice_ticks(3, 3) == [3]
    assert [round(10**tick, 6) for tick in log_ticks(math.log10(0.3), math.log10(6))] == [0.2, 0.5, 1, 2, 5, 10]
    assert log_ticks(-3.5, 9.2) == [-4, -1, 2, 5, 8, 11]
    assert centred_mean(np.array([1.0, 2, 9, 4, 5]), 1).tolist() == [1, 4, 5, 6, 4.5]


def test_steps_that_were_done_again_count_once(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 2.5}, {"step": 3, "loss": None}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "lo')
    table = Table.read(tmp_path / "metrics.jsonl")
    assert table.steps.tolist() == [1, 2, 3] and table.column("loss")[:2].tolist() == [3.0, 2.5]
    assert table.last("loss") == 2.5 and table.curve("lr") is None
    assert len(Table.read(tmp_path / "none.jsonl")) == 0


def test_the_time_of_steps_without_one(tmp_path: Path) -> None:
    lines = [{"step": step, "step_seconds": 2.0} for step in range(1, 7)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    table = Table.read(tmp_path / "metrics.jsonl")
    assert table.times([(100.0, 0), (500.0, 4)]).tolist() == [102, 104, 106, 108, 502, 504]
    assert len(table.times([])) == 0


def test_the_time_line_shows_starts_losses_and_gaps() -> None:
    steps = np.arange(1.0, 21)
    times = np.concatenate([np.arange(1.0, 11), np.arange(101.0, 111)])
    stretches = [Stretch(0, 14, 0, 10, 13), Stretch(100, 110, 10, 20, 20)]
    happened = [Event(0, "start", 0, "s"), Event(14, "fault", 13, "<died>"), Event(100, "start", 10, "s")]
    drawn = timeline(steps, times, np.full(20, 0.5), stretches, happened)
    assert drawn is not None
    assert (drawn.seconds, drawn.running_seconds, drawn.training_seconds, drawn.lost_steps) == (110, 24, 10, 3)
    svg = ElementTree.fromstring(str(drawn.svg))
    assert [each.attrib["class"] for each in svg.iter("polyline")] == ["mean", "lost", "mean"]
    (gap,) = [each for each in svg.iter("rect") if each.attrib["class"] == "idle"]
    assert float(gap.attrib["width"]) == pytest.approx(86 / 110 * (1140 - 78 - 12), abs=0.2)
    assert [each.find("title").text.split(": ")[1] for each in svg.iter("circle")] == ["s", "s", "<died>"]  # type: ignore[union-attr]
    assert timeline(steps, np.empty(0), steps, stretches, []) is None


def test_settings_that_differ() -> None:
    found = differences({"a": {"b": 1, "c": 2}, "d": [1], "e": None}, {"a": {"b": 1, "c": 3}, "d": [2], "e": None})
    assert found == [("a.c", "2"), ("d", "[1]")]
