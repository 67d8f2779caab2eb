"""Raw tuples as users have them: a folder of small real files and a manifest."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.data_pipelines.tuples import encode_image, encode_sound

Record = dict[str, Any]


def write_files(folder: Path, count: int) -> list[Record]:
    """`count` images and sounds below `folder`, and the records that name them; every fifth lacks one of them."""
    (folder / "images").mkdir(parents=True)
    (folder / "sounds").mkdir()
    records: list[Record] = []
    for number in range(count):
        random = np.random.default_rng(number)
        image, sound = f"images/{number}.png", f"sounds/{number}.flac"
        (folder / image).write_bytes(encode_image(random.integers(0, 256, (12, 16), dtype=np.uint8)))
        (folder / sound).write_bytes(encode_sound(0.5 * random.standard_normal(800).clip(-1, 1)))
        records.append(
            {
                "id": f"row-{number:03d}",
                "split": "train" if number % 4 else "test",
                "image": None if number % 5 == 1 else image,
                "text": f"caption {number}, with a comma and é",
                "audio": None if number % 5 == 2 else sound,
                "label": number % 3,
                "label_name": ("ant", "bee", "cat")[number % 3],
                "speaker": None if number % 5 == 2 else f"speaker {number % 2}",
            }
        )
    return records


def write_csv(path: Path, records: list[Record]) -> Path:
    """A CSV manifest; None becomes an empty cell."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return path


def write_jsonl(path: Path, records: list[Record]) -> Path:
    """A JSONL manifest; None becomes null."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_parquet(path: Path, records: list[Record]) -> Path:
    """A Parquet manifest."""
    pq.write_table(pa.Table.from_pylist(records), path)
    return path
