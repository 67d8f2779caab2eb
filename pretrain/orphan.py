"""What becomes of a rank whose launcher is gone: it tries to save, and ends within 5 seconds whatever hangs.

The kernel sends SIGTERM when the launcher dies, which asks the loop to save and stop. A rank that waits in a
collective for one that is gone would never come to that, so a thread puts an end to it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

LAUNCHER_VARIABLE = "TRIPTYCH_LAUNCHER"
"""Environment variable in which our own launcher says its process id, so that a rank sees that it is gone already."""
SECONDS_TO_SAVE = 4.5
_PR_SET_PDEATHSIG = 1


def end_with_launcher() -> None:
    """Have this rank save and end when its torchelastic launcher dies; else ranks train on alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    launcher = int(os.environ.get(LAUNCHER_VARIABLE) or os.getppid())
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    threading.Thread(target=_end_after, args=(launcher,), name="launcher watch", daemon=True).start()


def _end_after(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.2)
    # Once more for a launcher that died before the kernel was asked to tell.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_SAVE)
    os.write(2, b"the launcher is gone and this rank could not save within 5 seconds: it ends\n")
    os.kill(os.getpid(), signal.SIGKILL)
