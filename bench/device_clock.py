"""Time on a device: CUDA events on a GPU, the host's clock elsewhere."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


class DeviceClock:
    """Marks on a device's current stream; times between them may be read after `wait`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        """A point that the device reaches after all it was told so far."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self) -> None:
        """Wait until every mark is reached."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def ms(self, begin: Any, end: Any) -> float:
        """Milliseconds between two marks."""
        return float(begin.elapsed_time(end) if self._device.type == "cuda" else (end - begin) * 1e3)


def median_ms(action: Callable[[], Any], clock: DeviceClock, count: int) -> float:
    """Median milliseconds of `count` runs back to back, after two warm-up runs."""
    for _ in range(2):
        action()
    marks = [clock.mark()]
    for _ in range(count):
        action()
        marks.append(clock.mark())
    clock.wait()
    return statistics.median(clock.ms(begin, end) for begin, end in itertools.pairwise(marks))


def matmul_tflop_per_s(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """The rate of a square matmul of random numbers: the ceiling that training steps are held against."""
    generator = torch.Generator(device).manual_seed(3)
    left, right = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / median_ms(lambda: torch.mm(left, right, out=out), DeviceClock(device), 20) / 1e9
