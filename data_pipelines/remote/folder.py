"""What a remote folder is to the rest: files to be read from an offset, and two ways to fail.

`BadInput` is final. `Broken` may be gone at the next attempt: `Attempts` counts them and waits in between.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Generator
from typing import Protocol, TypeVar

from data_pipelines.config import RemoteConfig
from data_pipelines.errors import BadInput
from data_pipelines.remote.urls import check_url, hide_credentials

Result = TypeVar("Result")

CHUNK_BYTES = 1 << 20
_LONGEST_PAUSE_SECONDS = 30.0
_TOLD_PAUSE_SECONDS = 2.0
# Not the global generator: jitter must not move a run's random numbers.
_random = random.SystemRandom()
_log = logging.getLogger(__name__)


class Broken(Exception):
    """A failure that another attempt may not meet. `retry_after`: seconds that the server asked for."""

    def __init__(self, reason: object, retry_after: float = 0.0) -> None:
        super().__init__(hide_credentials(reason))
        self.retry_after = retry_after


class WrongSize(Exception):
    """The remote file is not as long as dataset.json says."""


class Stopped(Exception):
    """Nobody wants the result any more."""


class RemoteFolder(Protocol):
    """Files below one URL. May be pickled, forked and shared between threads."""

    @property
    def location(self) -> str:
        """The folder's URL, fit to be shown."""

    def stream(self, path: str, start: int, size: int | None) -> Generator[bytes, None, None]:
        """The bytes of a file from `start` to its end, in chunks.

        `size` is the whole file's length where it is known. Raises `BadInput`, `Broken`, and `WrongSize`.
        """

    def read(self, path: str, start: int, length: int) -> bytes:
        """`length` bytes, at least one, from `start`. Raises `BadInput` and `Broken`."""


def open_folder(url: str, settings: RemoteConfig) -> RemoteFolder:
    """The folder behind a URL that is no file:// one. Raises `BadInput` for one that may not be read."""
    checked = check_url(url)
    if checked.startswith(("http://", "https://")):
        from data_pipelines.remote.http import HttpFolder

        return HttpFolder(checked, settings)
    from data_pipelines.remote.objects import ObjectFolder

    return ObjectFolder(checked, settings)


class Attempts:
    """Attempts at one thing: exponential back-off with jitter, and a limit to failures without progress."""

    def __init__(self, what: str, settings: RemoteConfig, stop: threading.Event | None = None) -> None:
        self._what, self._limit, self._first = what, settings.retries, settings.retry_seconds
        self._stop = stop or threading.Event()
        self._failures = 0

    def progress(self) -> None:
        """Something arrived: the count of failures starts again."""
        self._failures = 0
        if self._stop.is_set():
            raise Stopped

    def failed(self, error: Broken) -> None:
        """Wait before the next attempt; raises `BadInput` when there is none left, and `Stopped`."""
        self._failures += 1
        if self._failures > self._limit:
            raise BadInput(f"{self._what}: gave up after {self._failures} attempts without progress: {error}") from None
        pause = min(_LONGEST_PAUSE_SECONDS, self._first * 2 ** (self._failures - 1)) * _random.uniform(0.5, 1.5)
        pause = max(pause, min(error.retry_after, _LONGEST_PAUSE_SECONDS))
        if pause >= _TOLD_PAUSE_SECONDS:
            _log.warning("%s: %s; trying again in %.0f s", self._what, error, pause)
        if self._stop.wait(pause):
            raise Stopped

    def run(self, function: Callable[[], Result]) -> Result:
        """Call `function` until it is not `Broken`."""
        while True:
            try:
                return function()
            except Broken as error:
                self.failed(error)


def read_all(folder: RemoteFolder, path: str, limit: int, settings: RemoteConfig) -> bytes:
    """A whole small file. Raises `BadInput` when it is not there, too large, or cannot be had."""

    def once() -> bytes:
        data = bytearray()
        for chunk in folder.stream(path, 0, None):
            data += chunk
            if len(data) > limit:
                raise BadInput(f"{where}: more than {limit:,} bytes")
        return bytes(data)

    where = f"{folder.location}/{path}"
    return Attempts(where, settings).run(once)
