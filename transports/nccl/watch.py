"""Waiting for NCCL and its stream, which notify no one: polls with a back-off, a deadline and a way to cancel."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable
from typing import Final

from specd.errors import TransportError

EAGER_S: Final = 500e-6
"""How long a wait polls before it sleeps: NCCL notifies no one, and the shortest sleep is as long as 16 MiB take."""
BYTES_S: Final = 300e9
"""A little less than NVLink gives: a wait for n bytes polls for n / BYTES_S longer."""
PAUSE_S: Final = (20e-6, 1e-3)
"""The shortest and the longest sleep between two looks after that."""


def patience(waited_s: float) -> float:
    """The back-off between two looks: a twentieth of the time waited so far, within PAUSE_S."""
    return min(max(waited_s / 20, PAUSE_S[0]), PAUSE_S[1])


class Watch:
    """A deadline that can also be cancelled."""

    __slots__ = ("_cancelled", "_deadline", "_seconds")

    def __init__(self, seconds: float, cancelled: threading.Event) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._cancelled = cancelled

    def until(self, done: Callable[[], bool], what: str, eager_s: float = EAGER_S) -> None:
        """Poll until `done`. Raises TransportError, beginning with `what`, at the deadline or when it is cancelled."""
        begin = time.monotonic()
        while not done():
            now = time.monotonic()
            if self._cancelled.is_set():
                raise TransportError(f"{what} was cancelled")
            if now > self._deadline:
                raise TransportError(f"{what} took longer than {self._seconds:g} s")
            if now - begin < eager_s:
                # Lets other threads have the GIL. time.sleep(0) does, too, for 60 µs: the kernel's timers are slack.
                select.select((), (), (), 0)
            else:
                self._cancelled.wait(patience(now - begin))
