"""Time on a device: marks of the host's clock, the median after warm-up, the rate of a matmul."""

from __future__ import annotations

import pytest
import torch

from specd.bench.device_clock import DeviceClock, matmul_tflop_per_s, median_ms

CPU = torch.device("cpu")


class Scripted(DeviceClock):
    """A clock whose marks are given, in milliseconds."""

    def __init__(self, *marks: float) -> None:
        super().__init__(CPU)
        self._marks = iter(marks)

    def mark(self) -> float:
        return next(self._marks) / 1e3


def test_the_median_leaves_two_runs_out() -> None:
    runs: list[int] = []
    assert median_ms(lambda: runs.append(1), Scripted(0, 1, 10, 13), 3) == pytest.approx(3)
    assert len(runs) == 5


def test_marks_of_the_host_are_in_order() -> None:
    clock = DeviceClock(CPU)
    first, second = clock.mark(), clock.mark()
    clock.wait()
    assert clock.ms(first, second) >= 0


def test_a_matmul_has_a_rate() -> None:
    assert matmul_tflop_per_s(64, CPU, torch.float32) > 0
