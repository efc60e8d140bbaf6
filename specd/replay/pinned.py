"""Cells in the memory of this host: page-locked where the ring is on a GPU, so that copies to and from it are fast."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from specd.errors import ConfigError
from specd.memory import cuda
from specd.memory.arena import LINE, MAX_SLOTS, PAGE, HostArena

if TYPE_CHECKING:
    import torch

GB = 10**9


class Pinned:
    """Equal cells of `cell_bytes`, all of them backed by memory. device: of the ring.

    Which batch lies in which is a Store's to say. Raises TransportError where the memory cannot be had.
    """

    def __init__(self, cells: int, cell_bytes: int, device: str) -> None:
        self.cells, self.cell_bytes = cells, cell_bytes
        self._device = device
        self._arena = HostArena.create(cells, cell_bytes, None)
        self._locked = device.startswith("cuda")
        try:
            if self._locked:
                cuda.register(*self._arena.mapping, device)
            else:
                _touch(self._arena)
        except BaseException:
            self._arena.close()
            raise

    def view(self, cell: int) -> memoryview:
        """The bytes of a cell, page-aligned."""
        return self._arena.slot(cell)

    def tensor(self, cell: int) -> torch.Tensor:
        """The same as uint8 [cell_bytes]."""
        return self._arena.tensor(cell)

    def close(self) -> None:
        """Give the memory back, with no copy in flight. Idempotent."""
        if self._locked:
            self._locked = False
            cuda.unregister(self._arena.mapping.address, self._device)
        self._arena.close()

    def __repr__(self) -> str:
        return f"Pinned({self.cells} cells × {self.cell_bytes} bytes, for {self._device})"


def cells_in(budget: int, cell_bytes: int, asked: str = "--replay-ram-gb") -> int:
    """How many cells `budget` bytes have room for, at most as many as one mapping takes. asked: by which flag.

    Raises ConfigError where that is none, or this host has not as much memory to give.
    """
    if (free := available()) < budget:
        raise ConfigError(f"{asked} {budget / GB:g}: this host has {free / GB:.1f} GB of memory to give; ask for less")
    # An arena has a line a slot, and one more, in pages of their own.
    cells = min(MAX_SLOTS, (budget - 2 * PAGE) // (cell_bytes + LINE))
    if cells < 1:
        raise ConfigError(
            f"{asked} {budget / GB:g} has no room for one batch: a slot has {cell_bytes / GB:.3f} GB here"
        )
    return cells


def available(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that a process of this host, and of this container, may still take."""
    fields = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) << 10
    with contextlib.suppress(OSError, ValueError, KeyError):  # no limit is the word max
        limit, used = (int((groups / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (groups / "memory.stat").read_text().splitlines())["inactive_file"]
        free = min(free, max(0, limit - used + int(cached)))
    return free


def _touch(arena: HostArena) -> None:
    """Have the kernel back every page now: memory that is missing is missed at the start."""
    for slot in range(arena.num_slots):
        np.frombuffer(arena.slot(slot), np.uint8)[::PAGE] = 0
