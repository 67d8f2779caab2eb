"""The one error that a user can mend.

Everything a user may get wrong (a folder, a config value, a file that is no tar) ends as `BadInput`: one line that says
what is wrong, where, and what to do. The command line prints it and exits with status 2. Any other exception is a fault
of ours and keeps its traceback.
"""

from __future__ import annotations


class BadInput(ValueError):
    """What a user got wrong, in one clear line; the command line exits with status 2."""
