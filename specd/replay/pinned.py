"""Cells in the memory of this host for slots of a ring: page-locked where that is on a GPU, so that copies are fast."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from specd.errors import ConfigError
from specd.memory import cuda
from specd.memory.arena import LINE, MAX_SLOTS, PAGE, HostArena
from specd.memory.device_arena import DeviceArena
from specd.replay.coding import Coded, Coder
from specd.replay.files import GB

if TYPE_CHECKING:
    import torch


class Pinned:
    """Cells as large as the slots of `ring`, or as their images by `coder`, all of them backed by memory.

    Which batch lies in which is a Store's to say, or control's. Raises TransportError where the memory cannot be had.
    """

    def __init__(self, cells: int, ring: HostArena | DeviceArena, coder: Coder | None = None) -> None:
        self.cells, self.cell_bytes = cells, coder.cell_bytes if coder is not None else ring.stride
        self._ring, self._coder = ring, coder
        self._arena = HostArena.create(cells, self.cell_bytes, None)
        self._locked = ring.device.startswith("cuda")
        try:
            if self._locked:
                cuda.register(*self._arena.mapping, ring.device)
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

    def save(
        self, cell: int, slot: int, generation: int, nbytes: int, copier: cuda.Copier, coded: Coded | None = None
    ) -> bool:
        """Copy the first `nbytes` bytes of a slot to a cell; False if it is not of that generation to the last byte.

        copier: of this thread. coded: how the slot is encoded, instead, which takes a coder.
        """
        if self._ring.generation(slot) != generation:
            return False
        if coded is not None:
            assert self._coder is not None
            self._coder.encode(self._ring.tensor(slot), self.tensor(cell), coded, copier)
        elif isinstance(self._ring, DeviceArena):
            copier.copy(self.tensor(cell)[:nbytes], self._ring.tensor(slot)[:nbytes])
        else:
            _copy(self.view(cell)[:nbytes], self._ring.slot(slot)[:nbytes])
        # A refill that began under the copy has set it to 0 before it wrote.
        return self._ring.generation(slot) == generation

    def load(
        self, cell: int, slot: int, generation: int, nbytes: int, copier: cuda.Copier, coded: Coded | None = None
    ) -> None:
        """Fill a slot with the first `nbytes` bytes of a cell, and seal it. copier, coded: as of `save`."""
        self._ring.begin(slot)
        if coded is not None:
            assert self._coder is not None
            self._coder.decode(self.tensor(cell), self._ring.tensor(slot), coded, copier)
            nbytes = coded.states.nbytes
        elif isinstance(self._ring, DeviceArena):
            copier.copy(self._ring.tensor(slot)[:nbytes], self.tensor(cell)[:nbytes])
        else:
            _copy(self._ring.slot(slot)[:nbytes], self.view(cell)[:nbytes])
        self._ring.seal(slot, generation, nbytes)

    def close(self) -> None:
        """Give the memory back, with no copy in flight. Idempotent."""
        if self._locked:
            self._locked = False
            cuda.unregister(self._arena.mapping.address, self._ring.device)
        self._arena.close()

    def __repr__(self) -> str:
        return f"Pinned({self.cells} cells × {self.cell_bytes} bytes, for {self._ring.device})"


def cells_in(budget: int, cell_bytes: int, asked: str = "--replay-ram-gb") -> int:
    """How many cells `budget` bytes have room for, at most as many as one mapping takes. asked: by which flag.

    Raises ConfigError where that is none, or this host has not as much memory to give.
    """
    if (free := available()) < budget:
        raise ConfigError(f"{asked} {budget / GB:g}: this host has {free / GB:.1f} GB of memory to give; ask for less")
    # An arena has a line a slot, and one more, in pages of their own.
    cells = min(MAX_SLOTS, (budget - 2 * PAGE) // (cell_bytes + LINE))
    if cells < 1:
        raise ConfigError(f"{asked} {budget / GB:g} has no room for one batch: it takes {cell_bytes / GB:.3f} GB here")
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


def _copy(into: memoryview, source: memoryview) -> None:
    """Copy bytes and let other threads run meanwhile."""
    np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(source, np.uint8))
