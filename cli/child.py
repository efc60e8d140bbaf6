"""A command that is killed with whoever started it: `python -m specd.cli.child PID VERB …`, PID being its parent's."""

from __future__ import annotations

import signal
import sys

from specd.parent import when_parent_dies

if __name__ == "__main__":
    when_parent_dies(int(sys.argv.pop(1)), signal.SIGKILL)
    from specd.cli.main import main

    main()
