"""A command that is killed with whoever started it: `python -m specd.cli.child PID VERB …`, PID being its parent's."""

from __future__ import annotations

import os
import signal
import sys

from specd.parent import when_parent_dies

if __name__ == "__main__":
    when_parent_dies(signal.SIGKILL)
    if os.getppid() != int(sys.argv.pop(1)):  # it was dead already
        os._exit(1)
    from specd.cli.main import main

    main()
