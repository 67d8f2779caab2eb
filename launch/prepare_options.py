"""Options of `triptych data build` that say what is left out, cleaned and written anew."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from data_pipelines.config import PrepareConfig
from data_pipelines.errors import BadInput

Require = Annotated[
    list[str] | None,
    typer.Option(metavar="MEMBER", help="Leave out rows without image, text or audio. May be repeated."),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FIELD=A,B", help="Keep the rows whose metadata field has one of these values. May be repeated."
    ),
]
MinImageSide = Annotated[
    int | None, typer.Option(metavar="PIXELS", help="Leave out rows whose image is smaller than this on one side.")
]
MaxSeconds = Annotated[float | None, typer.Option(metavar="SECONDS", help="Leave out rows with a longer sound.")]
CleanText = Annotated[
    bool, typer.Option("--clean-text", help="Texts in Unicode NFC, on one line, without control characters.")
]
StripHtml = Annotated[bool, typer.Option("--strip-html", help="Take HTML tags and entities out of texts, and clean.")]
Dedup = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MEMBERS",
        help="Leave out rows that repeat `image`, `audio`, `text`, or several (`image+text`), byte for byte. "
        "May be repeated.",
    ),
]
DedupImages = Annotated[
    int | None,
    typer.Option(
        metavar="BITS", help="Leave out rows whose image looks like an earlier one: perceptual hashes this near; try 4."
    ),
]
AudioRate = Annotated[int | None, typer.Option(metavar="HZ", help="Write sounds as mono FLAC at this rate.")]
ImageSide = Annotated[int | None, typer.Option(metavar="PIXELS", help="Scale images down to this on the longer side.")]
ImageFormat = Annotated[str | None, typer.Option(metavar="jpeg|png|webp", help="Write all images in this format.")]


def prepare_config(keep: list[str] | None, **options: Any) -> PrepareConfig:
    """The settings that the options stand for. Raises `BadInput` and pydantic's `ValidationError`."""
    values: dict[str, list[str]] = {}
    for option in keep or []:
        name, equals, listed = option.partition("=")
        if not (name and equals and listed):
            raise BadInput(f"--keep {option}: give FIELD=VALUE or FIELD=A,B, for example language=en,de")
        values.setdefault(name, []).extend(listed.split(","))
    given = {name: value for name, value in options.items() if value is not None}
    return PrepareConfig(keep=values, **given)
