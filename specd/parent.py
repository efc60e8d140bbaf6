"""What becomes of a process when the one that started it dies."""

from __future__ import annotations

import ctypes
import signal

PR_SET_PDEATHSIG = 1


def when_parent_dies(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent dies from now on, also by SIGKILL.

    It counts as dead when the thread that started this process ends.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
