"""The preview page in a real Chromium: what is on it can be seen and heard, filters filter, hostile text stays text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.preview import write_preview
from tests.browser import set_scheme, started_browser
from tests.data_pipelines.hostile_preview import CAPTION, SCRIPT, make_hostile

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with started_browser(tmp_path_factory.mktemp("chromium")) as started:
        yield started


@pytest.fixture
def page(browser: Any, make_dataset: Callable[..., Path], tmp_path: Path) -> Any:
    write_preview(make_hostile(make_dataset), tmp_path / "page.html", progress=False)
    browser.get((tmp_path / "page.html").as_uri())
    return browser


def shown_keys(page: Any) -> list[str]:
    script = """const shown = [...document.querySelectorAll('article')].filter(card => card.checkVisibility());
    return shown.map(card => card.querySelector('.key').textContent)"""
    return list(page.execute_script(script))


def type_filter(page: Any, words: str) -> None:
    from selenium.webdriver.common.by import By

    field = page.find_element(By.ID, "search")
    field.clear()
    field.send_keys(words)


def test_pictures_and_spectrograms_are_drawn(page: Any) -> None:
    sizes = page.execute_script(
        "return [...document.images].map(i => [i.alt, i.complete, i.naturalWidth, i.getBoundingClientRect().height])"
    )
    assert len(sizes) == 6 + 7
    assert all(complete and width > 0 and height > 30 for _, complete, width, height in sizes)
    assert {alt.split()[0] for alt, *_ in sizes} == {"picture", "spectrogram"}


def test_a_sound_can_be_played(page: Any) -> None:
    seconds = page.execute_async_script(
        """const [done] = [...arguments].slice(-1); const player = document.querySelector('audio');
        player.onloadedmetadata = () => done(player.duration); player.onerror = () => done(player.error.message);
        player.load();"""
    )
    assert seconds == pytest.approx(0.375, abs=0.1)


def test_captions_keys_and_metadata_are_there(page: Any) -> None:
    captions = page.execute_script("return [...document.querySelectorAll('blockquote')].map(q => q.textContent)")
    assert captions[0] == CAPTION and captions[1:] == [f"the number {number} é" for number in range(1, 8)]
    assert shown_keys(page) == ["a'\"><script>x<", *(f"sample-{number:05d}" for number in range(1, 8))]
    assert page.execute_script("return document.querySelector('dd:nth-of-type(3)').textContent") == SCRIPT


def test_a_hostile_caption_is_text(page: Any) -> None:
    assert page.title == "<u>set: a look at the dataset"
    assert page.execute_script("return document.querySelectorAll('script').length") == 1
    assert page.execute_script("return document.querySelector('h1').textContent") == "<u>set"
    names = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith("data:") for name in names)
    # A script or a request that the page's policy had to refuse would stand here.
    assert [line for line in page.get_log("browser") if line["level"] == "SEVERE"] == []


def test_a_script_that_got_in_would_not_run(page: Any) -> None:
    page.execute_script(
        """const script = document.createElement('script');
        script.textContent = 'document.title = 1'; document.body.append(script)"""
    )
    page.execute_script("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    assert page.title == "<u>set: a look at the dataset"


def test_filter_by_key_and_text(page: Any) -> None:
    type_filter(page, "SAMPLE-00003")
    assert shown_keys(page) == ["sample-00003"]
    assert page.execute_script("return document.getElementById('told').textContent") == "1 of 8 shown"
    type_filter(page, "number 5")
    assert shown_keys(page) == ["sample-00005"]
    type_filter(page, "nowhere")
    assert shown_keys(page) == []
    assert page.execute_script("return document.getElementById('nothing').checkVisibility()")
    type_filter(page, " ")
    assert len(shown_keys(page)) == 8


def test_filter_by_modality(page: Any) -> None:
    from selenium.webdriver.common.by import By

    buttons = {button.get_attribute("data-modalities"): button for button in page.find_elements(By.TAG_NAME, "button")}
    assert list(buttons) == ["", "image+text+audio", "image+text", "text+audio"]
    buttons["text+audio"].click()
    assert shown_keys(page) == ["sample-00002"]
    assert buttons["text+audio"].get_attribute("aria-pressed") == "true"
    buttons["image+text+audio"].click()
    assert len(shown_keys(page)) == 6
    type_filter(page, "number 6")
    assert shown_keys(page) == ["sample-00006"]
    buttons[""].click()
    assert shown_keys(page) == ["sample-00006"]


def test_light_and_dark(page: Any) -> None:
    colours = []
    for scheme in ("light", "dark"):
        set_scheme(page, scheme)
        colours.append(page.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(246, 246, 243)", "rgb(19, 21, 25)"]
