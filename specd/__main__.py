"""`python -m specd`: the same as the `specd` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from specd.cli.main import main


def remember_source() -> None:
    """Let child processes find the specd of a source tree that is not installed.

    `-m` found it in the working directory, where they do not look.
    """
    source = str(Path(__file__).parents[1])
    if sys.path[0] == source:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))


if __name__ == "__main__":
    remember_source()
    main()
