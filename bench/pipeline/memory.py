"""Memory that the sides of the pipeline benchmark hold: on their GPUs, or resident on the CPU."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from specd.bench.pipeline.settings import Settings


def memory(device: str, pid: int | str = "self") -> int:
    """Bytes in use on a GPU by all processes, or the peak resident size of one; 0 if that cannot be read."""
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else 0


def in_use(settings: Settings) -> dict[str, int]:
    """Bytes in use on each GPU of daemons and trainer; empty on the CPU."""
    devices = {*settings.daemon_devices, settings.trainer} - {"cpu"}
    return {device: memory(device) for device in devices}


def held(settings: Settings, before: dict[str, int], workers: Iterable[int]) -> tuple[int, int]:
    """Bytes that all daemons together, and the trainer, which is this process, hold by now.

    before: `in_use` before they started. workers: process ids of the daemons' targets, read on the CPU only. Where
    both sides share a GPU, the trainer's part is what its torch has reserved there.
    """
    if settings.trainer == "cpu":
        return sum(memory("cpu", pid) for pid in workers), memory("cpu")
    more = {device: used - before[device] for device, used in in_use(settings).items()}
    trainer = torch.cuda.memory_reserved(settings.trainer) if settings.shared else more[settings.trainer]
    both = trainer if settings.shared else 0
    return sum(more[device] for device in settings.daemon_devices) - both, trainer
