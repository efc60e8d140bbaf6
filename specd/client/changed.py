"""A condition whose lock no interrupt leaves held."""

from __future__ import annotations

import threading
from typing import Any


class Changed(threading.Condition):
    """A condition that is entered and left by its lock itself, in one step of the interpreter each.

    threading's own does both in Python, where Ctrl-C may be raised between having the lock and being in the block, or
    before it is let go: no other thread would ever get it again.
    """

    def __init__(self) -> None:
        self._mutex = threading.RLock()
        super().__init__(self._mutex)

    # What `with` calls is looked up before it waits.
    __enter__: Any = property(lambda self: self._mutex.__enter__)
    __exit__: Any = property(lambda self: self._mutex.__exit__)
