"""Ctrl-C, SIGTERM and SIGHUP of a training run: raised at once, or deferred while it writes weights."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """Turns the first SIGINT, SIGTERM or SIGHUP into KeyboardInterrupt, but never inside `shield()`.

    A context manager for the main thread; the handlers found at entry are restored at exit. A signal that is ignored
    at entry stays ignored: SIGHUP under nohup, SIGINT in the background job of a script. Unless entered, `shield()`
    has no effect, which is what tests and embedders want.
    """

    __slots__ = ("_deferred", "_depth", "_previous", "received")

    def __init__(self) -> None:
        self.received = 0
        """Number of the first signal, 0 if none came."""
        self._depth = 0
        self._deferred = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Defer signals: one that comes inside is raised at the end of the section."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._deferred and not self._depth:
            self._deferred = False
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A second signal must not cut the clean-up that the first one started.
        first = not self.received
        self.received = self.received or number
        if first and self._depth:
            self._deferred = True
        elif first:
            raise KeyboardInterrupt
