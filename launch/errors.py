"""How commands end when something is wrong: one line on standard error, and an exit status that says whose fault it is.

2 is bad input (arguments, config, data), 130 is Ctrl-C, 1 with a traceback is a fault of ours.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer
from pydantic import ValidationError

from data_pipelines.errors import BadInput, printable

BAD_INPUT = 2
INTERRUPTED = 130

P = ParamSpec("P")
R = TypeVar("R")


def exits_cleanly(command: Callable[P, R]) -> Callable[P, R]:
    """Decorate a command: what its user can mend becomes `error: ...` in one line, without a traceback.

    `BadInput` and pydantic's `ValidationError` exit with 2, Ctrl-C with 130. Other exceptions pass through.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except BadInput as error:
            message, status = f"error: {error}", BAD_INPUT
        except ValidationError as error:
            message, status = f"error: {describe_validation_error(error)}", BAD_INPUT
        except KeyboardInterrupt:
            message, status = "interrupted", INTERRUPTED
        except BrokenPipeError:
            # The reader of our output has gone (`| head`). Flushing at exit would fail on the same pipe again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        print(printable(" ".join(message.splitlines())), file=sys.stderr, flush=True)
        raise typer.Exit(status)

    return wrapped


def describe_validation_error(error: ValidationError) -> str:
    """The first thing that a pydantic model refuses, with its place, and how many others there are."""
    errors = error.errors(include_url=False)
    place = ".".join(map(str, errors[0]["loc"])) or error.title
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{place}: {errors[0]['msg']}{more}"
