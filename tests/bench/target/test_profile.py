"""A forward's profile: kernels that overlap count once."""

from __future__ import annotations

import torch

from specd.bench.target.profile import SHOWN, busy, longest, profile


def test_a_device_is_busy_while_any_kernel_runs() -> None:
    assert busy([(5, 7), (0, 2), (1, 3), (1.5, 1.6), (7, 8)]) == 6
    assert busy([]) == 0


def test_the_longest_kernels_come_first() -> None:
    assert [(kernel.name, kernel.ms, kernel.calls) for kernel in longest([("a", 500), ("b", 1250), ("a", 1000.0)])] == [
        ("a", 1.5, 2),
        ("b", 1.25, 1),
    ]
    assert len(longest((str(number), 1) for number in range(99))) == SHOWN


def test_a_cpu_launches_nothing() -> None:
    ran: list[int] = []
    assert profile(lambda: ran.append(int(torch.ones(3).sum())), "cpu") == (0.0, {}, ())
    assert ran == [3]
