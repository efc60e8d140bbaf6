"""Stand-ins for what the transport benchmark times: movers and loads whose figures are known."""

from __future__ import annotations

import itertools


class Timed:
    """A mover that says it took given seconds, in turn; a stream takes half of them each."""

    kind = "made up"

    def __init__(self, *seconds: float, log: list[str] | None = None, name: str = "") -> None:
        self._seconds = itertools.cycle(seconds)
        self._log = [] if log is None else log
        self._name = name

    def one(self, nbytes: int) -> float:
        self._log.append(self._name)
        return next(self._seconds)

    def stream(self, nbytes: int, count: int) -> float:
        self._log.append(f"{self._name} × {count}")
        return count * next(self._seconds) / 2

    def close(self) -> None:
        pass


class Busy:
    """A load that reaches given TFLOP/s, one after the other."""

    def __init__(self, *reached: float) -> None:
        self._reached = iter(reached)
        self.running = False

    def start(self) -> None:
        assert not self.running
        self.running = True

    def stop(self) -> float:
        assert self.running
        self.running = False
        return next(self._reached)
