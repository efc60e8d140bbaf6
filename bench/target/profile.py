"""Where a forward's time goes: the kernels it runs, and how long the device has none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch

from specd.bench.target.result import Kernel

SHOWN: Final = 16
"""Kernels in a profile, the longest first."""
NAME: Final = 100
"""Letters of a kernel's name that are kept: template arguments fill pages."""


def profile(action: Callable[[], object], device: str) -> tuple[float, dict[str, int], tuple[Kernel, ...]]:
    """Milliseconds that the device is busy with `action`, its launches by name, its longest kernels.

    Nothing of a CPU, which launches nothing.
    """
    on_gpu = device.startswith("cuda")
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        action()
        if on_gpu:
            torch.cuda.synchronize(device)
    events: list[Any] = list(profiler.events() or [])
    launches = Counter(event.name for event in events if "launch" in event.name.lower() and event.name.startswith("cu"))
    ran = [event for event in events if str(event.device_type).endswith("CUDA") and not event.is_user_annotation]
    return (
        round(busy((event.time_range.start, event.time_range.end) for event in ran) / 1e3, 3),
        dict(launches),
        tuple(longest((event.name, event.time_range.end - event.time_range.start) for event in ran)),
    )


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans: kernels of several streams run at once."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def longest(calls: Iterable[tuple[str, float]]) -> list[Kernel]:
    """The SHOWN kernels that take most in all. calls: name and microseconds."""
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for name, us in calls:
        spent[name[:NAME]] += us  # type: ignore[assignment]  # microseconds are no whole numbers
        count[name[:NAME]] += 1
    return [Kernel(name=name, ms=round(us / 1e3, 3), calls=count[name]) for name, us in spent.most_common(SHOWN)]
