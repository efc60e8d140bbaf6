"""A command that ends with whoever started it: `python -m specd.cli.child PID VERB …`, PID being its parent's."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies, also by SIGKILL; at once if that has happened."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


if __name__ == "__main__":
    end_with(int(sys.argv.pop(1)))
    from specd.cli.main import main

    main()
