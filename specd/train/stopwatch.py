"""How long the trainer's device works on something, however long the host waits meanwhile."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class Stopwatch:
    """The time that pieces of work take on `device`: as its stream comes to their ends, or the caller on the CPU."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._marks: list[Any] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Times what the body has the device do; what the body leaves with an error does not count."""
        begin = self._now()
        yield
        self._marks.append((begin, self._now()))

    def seconds(self) -> float:
        """The sum; the device must have done all of it."""
        if self._device.startswith("cuda"):
            return float(sum(begin.elapsed_time(end) for begin, end in self._marks)) / 1e3
        return float(sum(end - begin for begin, end in self._marks))

    def _now(self) -> Any:
        if not self._device.startswith("cuda"):
            return time.perf_counter()
        event: Any = torch.cuda.Event  # untyped
        point: Any = event(enable_timing=True)
        point.record(torch.cuda.current_stream(self._device))
        return point
