"""The interrupt: an event that also ends what other threads wait for, so that a subscriber closes at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class Interrupt(threading.Event):
    """An event, and what is called when it is set: ends of waits that look at something else than it."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._actions: list[Callable[[], object]] = []

    @contextlib.contextmanager
    def calling(self, action: Callable[[], object]) -> Iterator[None]:
        """In this block `set` calls `action`, on its own thread; at once if it was set before. It must not wait.

        When the block ends it is not called any more, nor still being called.
        """
        with self._lock:
            self._actions.append(action)
            if self.is_set():
                action()
        try:
            yield
        finally:
            with self._lock:
                self._actions.remove(action)

    def set(self) -> None:
        super().set()
        with self._lock:
            for action in self._actions:
                action()
