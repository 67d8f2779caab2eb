"""Files that exist whole or not at all.

A file is written under a hidden temporary name in its own folder, flushed to the disk, renamed, and then the folder is
flushed too: after a power cut there is the old file or the new one, never a half. The order (fsync, rename, fsync of
the parent) is SQLite's and the one that the checkpoint of this project follows.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename within it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[BufferedRandom]:
    """Open a temporary file beside `path` for writing and reading; on success it takes that name, on an error it goes.

    Its name is drawn at random, since process ids repeat from node to node: two processes that write the same path, on
    one machine or on two, do not meet, and the last rename wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{path.name}.{secrets.token_hex(6)}"
    try:
        with open(temporary, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)
