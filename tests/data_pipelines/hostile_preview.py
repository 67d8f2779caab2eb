"""A dataset whose texts try to become part of the page that shows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipelines.shard import Sample
from tests.data_pipelines.tuples import encode_image, tuple_sample

SCRIPT = "</blockquote><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
CAPTION = f"{SCRIPT} {{{{ 7 * 7 }}}} &lt;b&gt;"


def hostile_sample(number: int) -> Sample:
    """0 is hostile, 1 has no sound, 2 no picture, 3 is a large photo, 4 has a broken picture, the others are plain."""
    sample = tuple_sample(number, missing={1: "audio", 2: "image"}.get(number, ""))
    if number == 0:
        metadata = {"label": 1, "label_name": SCRIPT, "<i>name</i>": SCRIPT, "list": [1, "<b>"]}
        return replace(sample, key="a'\"><script>x<", text=CAPTION, metadata=metadata)
    if number == 3:
        photo = np.random.default_rng(3).integers(0, 256, (600, 900, 3), dtype=np.uint8)
        return replace(sample, image=encode_image(photo, "JPEG"), image_extension="jpg")
    return replace(sample, image=b"no picture") if number == 4 else sample


def make_hostile(make_dataset: Callable[..., Path]) -> Path:
    """Eight such samples in two shards."""
    return make_dataset(name="<u>set", sizes=(5, 3), sample=hostile_sample)
