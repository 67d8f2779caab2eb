"""The one error that a user can mend, and what may stand in its line.

Everything a user may get wrong (a folder, a config value, a file that is no tar) ends as `BadInput`: one line that says
what is wrong, where, and what to do. The command line prints it and exits with status 2. Any other exception is a fault
of ours and keeps its traceback.
"""

from __future__ import annotations


class BadInput(ValueError):
    """What a user got wrong, in one clear line; the command line exits with status 2."""


def printable(text: str) -> str:
    """`text` with everything that does not print (escapes, line ends, lone surrogates) as backslash escapes.

    Keys and names of files come from elsewhere, and none of them may steer the terminal.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def check_utf8(*names: str) -> None:
    """Raise `BadInput` for a file's name that JSON and Arrow cannot hold."""
    for name in names:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadInput(f"{name}: the name of this file or folder is not UTF-8; rename it") from error
