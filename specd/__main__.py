"""`python -m specd`: the same as the `specd` command."""

from __future__ import annotations

from specd.cli.main import main

if __name__ == "__main__":
    main()
