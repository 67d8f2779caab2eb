"""One real run of two ranks, watched from outside all its life: status, the dashboard in tmux, logs, stop, the page.

The run trains, loses a rank to SIGKILL, is started again by its supervisor, and is stopped. What the commands said
meanwhile is kept; the tests look at that.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.browser import set_scheme, started_browser
from tests.faults.harness import COMMAND, ENVIRONMENT, Running, recipe, triptych
from tests.ranks import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1800)]

WIDTH, HEIGHT = 132, 36


@dataclass
class Story:
    """What was seen of the run."""

    run: Path
    config: Path
    training: dict[str, Any]
    listed: list[dict[str, Any]]
    first_screen: str | None
    later_screen: str | None
    narrow_screen: str | None
    after_q: str | None
    after_kill: dict[str, Any]
    stop: subprocess.CompletedProcess[str]
    stopped: dict[str, Any]
    status: int
    followed: str
    followed_to_its_end: bool
    states: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("watched")
    config = recipe(
        folder,
        "watched",
        run={"name": "watched <b>run</b>"},
        train={"max_steps": 100_000, "warmup_steps": 5},
        supervisor={"max_restarts": 1, "backoff_seconds": 1},
        evaluation={"every_steps": 8, "batch": 8},
        logging={"every_steps": 5, "tensorboard": False},
    )
    run = Running(config)
    try:
        with terminal(folder, run.run_dir) as screen, following(run.run_dir, folder / "follow.txt") as follower:
            run.wait_for_step(9, 900)
            training, listed = status(run.run_dir), status(None, folder)
            first = wait_for_screen(screen, "training", "step 9|step [1-9][0-9]", lambda text: is_whole(text, WIDTH))
            later = wait_for_screen(screen, lambda text: steps_on(text) > steps_on(first or ""))
            if screen is not None:
                screen("resize-window", "-x", "80", "-y", str(HEIGHT))
            narrow = wait_for_screen(screen, lambda text: is_whole(text, 80))
            before = run.ranks()
            before[1].send_signal(signal.SIGKILL)
            states = []
            kept = run.step()
            end = time.monotonic() + 600
            while time.monotonic() < end:
                now = status(run.run_dir)
                states.append(now["state"])
                if now["state"] == "training" and now["restarts"] == 1 and now["step"] > kept + 3:
                    break
            after = now
            stop = triptych("stop", str(run.run_dir), "--json", seconds=600)
            ended = run.end()
            last = status(run.run_dir)
            with contextlib.suppress(subprocess.TimeoutExpired):
                follower.wait(30)
            to_its_end = follower.poll() == 0
            left = None
            if screen is not None:
                wait_for_screen(screen, "stopped")
                screen("send-keys", "q")
                left = wait_for_screen(screen, r"state +stopped", "left with")
        yield Story(
            run.run_dir,
            config,
            training,
            listed,
            first,
            later,
            narrow,
            left,
            after,
            stop,
            last,
            ended,
            (folder / "follow.txt").read_text(),
            to_its_end,
            states,
        )
    finally:
        run.kill()


Screen = Callable[..., str]


@contextlib.contextmanager
def terminal(folder: Path, run: Path) -> Iterator[Screen | None]:
    """The dashboard in a real tmux of its own; None where there is no tmux."""
    tmux = shutil.which("tmux")
    if tmux is None:
        yield None
        return
    socket = folder / "tmux"

    def command(*words: str) -> str:
        done = subprocess.run(
            [tmux, "-f", "/dev/null", "-S", str(socket), *words], capture_output=True, text=True, timeout=120
        )
        return done.stdout

    while not (run / "config.yaml").exists():
        time.sleep(0.1)
    words = [*COMMAND, "status", str(run), "--watch", "--every", "0.5"]
    script = folder / "watch.sh"
    quoted = " ".join(f"'{word}'" for word in words)
    # readline, which pytest loads, puts a size into the environment that is not that of the terminal.
    environment = f"unset COLUMNS LINES\nexport PYTHONPATH='{ROOT}' OMP_NUM_THREADS=1"
    script.write_text(f"{environment}\n{quoted}\necho left with $?\nexec cat\n")
    try:
        command("new-session", "-d", "-x", str(WIDTH), "-y", str(HEIGHT), f"bash '{script}'")
        yield command
    finally:
        command("kill-server")


@contextlib.contextmanager
def following(run: Path, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`triptych logs -f`, as another process."""
    with out.open("wb") as file:
        words = [*COMMAND, "logs", str(run), "-f"]
        process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def status(run: Path | None, below: Path = ROOT) -> Any:
    words = [*COMMAND, "status", *([str(run)] if run else []), "--json"]
    done = subprocess.run(words, cwd=below, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def wait_for_screen(screen: Screen | None, *wanted: str | Callable[[str], bool], seconds: float = 120) -> str | None:
    """The screen once everything wanted is on it, as a pattern or by a function."""
    if screen is None:
        return None
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        text = screen("capture-pane", "-p")
        if all(re.search(each, text) if isinstance(each, str) else each(text) for each in wanted):
            return text
        time.sleep(0.2)
    raise AssertionError(f"never came: {wanted}\n{text}")


def is_whole(text: str, width: int) -> bool:
    """Whether the dashboard fills a terminal of this width, from its first to its last line."""
    lines = text.splitlines() or [""]
    corners = "".join(line[:1] + line[-1:] for line in (lines[0], lines[-1]))
    # A terminal that has just been made narrower shows the left part of what was there.
    return len(lines) == HEIGHT and len(lines[0]) == len(lines[-1]) == width and corners == "╭╮╰╯"


def steps_on(text: str) -> int:
    found = re.search(r"step ([\d,]+) of 100,000", text)
    return int(found[1].replace(",", "")) if found else 0


def test_status_of_a_run_that_trains(story: Story) -> None:
    found = story.training
    assert (found["state"], found["live"], found["name"]) == ("training", True, "watched <b>run</b>")
    assert found["step"] >= 9 and found["max_steps"] == 100_000 and 0 < found["share"] < 1
    assert found["ranks"] == 2 and found["zero_stage"] == 2 and found["restarts"] == 0 and found["incidents"] == 0
    assert found["loss"] > 0 and set(found["losses"]) == {"text", "align", "image", "audio"}
    assert found["samples_per_second"] > 0 and found["seconds_left"] > found["seconds_a_step"] > 0
    assert found["checkpoint"]["step"] >= 5 and 0 <= found["checkpoint"]["age_seconds"] < 200
    assert [beat["rank"] for beat in found["heartbeats"]] == [0, 1]
    assert all(
        beat["phase"] in ("data", "forward", "backward", "optimizer", "checkpoint", "evaluate")
        for beat in found["heartbeats"]
    )
    assert [(each["state"], each["run"]) for each in story.listed] == [("training", "watched")]


def test_the_dashboard_in_a_real_terminal(story: Story) -> None:
    if story.first_screen is None or story.later_screen is None or story.after_q is None:
        pytest.skip("tmux is not installed")
    screen = story.first_screen
    for word in (
        "watched <b>run</b>",
        "losses, over",
        "align",
        "image",
        "audio",
        "samples/s",
        "data wait",
        "grad norm",
    ):
        assert word in screen, word
    for word in (
        "rank 0",
        "rank 1",
        "2 ranks, ZeRO 2, fp32",
        "checkpoint",
        "events",
        "started from nothing",
        "ends in",
    ):
        assert word in screen, word
    assert any(bar in screen for bar in "▂▃▄▅▆▇█")
    assert all(len(line) == WIDTH for line in screen.splitlines())
    assert story.narrow_screen is not None and "losses, over" in story.narrow_screen
    assert "speed, over" in screen and "speed, over" not in story.narrow_screen, "80 columns have no room for it"
    assert steps_on(story.later_screen) > steps_on(screen)
    # The terminal has its own screen back, with the last facts on it.
    assert "left with 0" in story.after_q and "╭" not in story.after_q and "incidents" in story.after_q


def test_a_killed_rank_is_an_incident_and_the_restart_is_seen(story: Story) -> None:
    found = story.after_kill
    assert (found["state"], found["restarts"], found["incidents"]) == ("training", 1, 1), story.states
    incident = found["last_incident"]
    assert (
        incident["kind"] == "rank_died" and "SIGKILL" in incident["text"] and (story.run / incident["file"]).is_file()
    )
    assert {"restarting", "starting"} & set(story.states), story.states
    assert not {"done", "failed", "stopped"} & set(story.states), story.states


def test_stop_waits_for_the_checkpoint(story: Story) -> None:
    assert story.stop.returncode == 0, story.stop.stderr
    told = json.loads(story.stop.stdout)
    assert told["state"] == "stopped" and told["checkpoint"]["step"] == told["step"]
    assert "asked" in story.stop.stderr and story.status == 75
    assert story.stopped["state"] == "stopped" and not story.stopped["live"] and story.stopped["seconds_left"] is None
    assert not (story.run / "STOP").exists()
    again = triptych("stop", str(story.run))
    assert again.returncode == 2 and "nothing to stop: stopped" in again.stderr


def test_logs_follow_until_the_end(story: Story) -> None:
    assert story.followed_to_its_end
    lines = story.followed.splitlines()
    steps = [int(found[1]) for line in lines if (found := re.search(r"rank 0 \| .* step (\d+)/100000", line))]
    assert steps[:2] == [5, 10] and steps[-1] > 10
    assert any(re.match(r"supervisor \| .*fault: rank 1: killed by SIGKILL", line) for line in lines)
    assert any("restart 1 in 1 s" in line for line in lines)
    assert sum("== start" in line for line in lines) == 2


def test_logs_of_one_rank_and_their_last_lines(story: Story) -> None:
    done = triptych("logs", str(story.run), "--rank", "1", "-n", "3")
    text = (story.run / "logs" / "rank-1.log").read_text().splitlines()
    assert done.stdout.splitlines() == text[-3:] and "rank 1 |" not in done.stdout
    both = triptych("logs", str(story.run), "--rank", "0", "--rank", "1", "-n", "1").stdout.splitlines()
    assert sorted(line[:8] for line in both) == ["rank 0 |", "rank 1 |"]
    none = triptych("logs", str(story.run), "--rank", "7")
    assert none.returncode == 2 and "no log of rank 7" in none.stderr and "rank 0-1" in none.stderr


def test_the_tables_for_people(story: Story) -> None:
    shown = triptych("status", str(story.config)).stdout
    for word in ("stopped", "watched <b>run</b>", "of 100,000", "checkpoint", "restarts", "incidents", "SIGKILL"):
        assert word in shown, word
    table = subprocess.run(
        [*COMMAND, "status"], cwd=story.run.parent, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    ).stdout
    assert re.search(r"watched +stopped +\d+ +0%", table)
    watch = triptych("status", str(story.run), "--watch")
    assert watch.returncode == 2 and "needs a terminal" in watch.stderr
    (line,) = triptych("status", str(story.run), "--watch", "--json").stdout.splitlines()
    assert json.loads(line)["state"] == "stopped"


@pytest.fixture(scope="module")
def page(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    done = triptych("report", str(story.run), seconds=300)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == story.run / "report.html"
    with started_browser(tmp_path_factory.mktemp("chromium")) as browser:
        browser.get((story.run / "report.html").as_uri())
        yield browser


def test_the_page_shows_the_run(page: Any, story: Story) -> None:
    text = page.execute_script("return document.body.innerText")
    for word in ("watched <b>run</b>", "stopped", "Time line", "total loss", "alignment", "throughput", "data wait"):
        assert word in text, word
    for word in (
        "learning rate",
        "gradient norm",
        "Zero-shot classification",
        "small-0",
        "SIGKILL",
        "torch",
        "supervisor.max_restarts",
    ):
        assert word in text, word
    circles = page.execute_script(
        "return [...document.querySelectorAll('#timeline ~ .card circle.event')].map(c => c.getAttribute('class'))"
    )
    assert circles.count("event start") == 2 and circles.count("event fault") == 1
    assert circles.count("event evaluation") >= 1
    # Steps that were lost to the killed rank lead nowhere, and the rest is one line a start.
    assert page.execute_script("return document.querySelectorAll('#timeline ~ .card polyline.mean').length") >= 2


def test_everything_is_drawn_within_its_box_and_nothing_is_asked_for(page: Any) -> None:
    overflow = page.execute_script(
        """return [...document.querySelectorAll('.chart, .tile, .media')].filter(
        box => box.scrollWidth > box.clientWidth + 1).map(box => box.innerText)"""
    )
    assert overflow == []
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    heights = page.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)"
    )
    assert len(heights) >= 12 and min(heights) > 80
    images = page.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth])")
    assert images and all(complete and width > 0 for complete, width in images)
    names = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith("data:") for name in names)
    assert [line for line in page.get_log("browser") if line["level"] == "SEVERE"] == []
    assert page.execute_script("return document.querySelectorAll('h1 b').length") == 0, "a name became markup"


def test_the_pointer_reads_all_charts_at_a_step(page: Any, story: Story) -> None:
    outputs = "return [...document.querySelectorAll('figure output')].map(o => o.textContent)"
    before = page.execute_script(outputs)
    page.execute_script(
        """const svg = document.querySelector('figure.wide svg'); svg.scrollIntoView();
        const box = svg.getBoundingClientRect();
        const at = {clientX: box.left + box.width * 0.3, clientY: box.top + 50};
        svg.dispatchEvent(new PointerEvent('pointermove', at))"""
    )
    step = int(page.execute_script("return document.getElementById('step').textContent").split()[1])
    records = [json.loads(line) for line in (story.run / "metrics.jsonl").read_text().splitlines()]
    assert 1 < step < records[-1]["step"]
    reading = page.execute_script(outputs)
    assert reading != before
    named = page.execute_script("return [...document.querySelectorAll('figcaption b')].map(b => b.textContent)")
    rate = float(reading[named.index("learning rate")])
    assert rate == pytest.approx(records[step - 1]["lr"], rel=0.2)
    page.execute_script("document.querySelector('figure.wide svg').dispatchEvent(new PointerEvent('pointerleave'))")
    assert page.execute_script(outputs) == before


def test_light_dark_and_narrow(page: Any) -> None:
    colours = []
    for scheme in ("light", "dark"):
        set_scheme(page, scheme)
        colours.append(
            page.execute_script(
                "return [getComputedStyle(document.body).backgroundColor, "
                "getComputedStyle(document.querySelector('svg .mean')).stroke]"
            )
        )
    assert colours[0][0] == "rgb(246, 246, 243)" and colours[1][0] == "rgb(19, 21, 25)"
    assert colours[0][1] != colours[1][1]
    page.set_window_size(420, 900)
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth + 1")
