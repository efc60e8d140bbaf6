"""Device time of the trainer's work, without the waits of the host."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class Stopwatch:
    """Total time of pieces of work on `device`: by events of the current stream, on the CPU by the wall clock."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._marks: list[Any] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time the body's work on the device; a body that raises does not count."""
        begin = self._now()
        yield
        self._marks.append((begin, self._now()))

    def seconds(self) -> float:
        """Total seconds; the device must have finished."""
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
