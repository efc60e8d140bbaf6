"""The lag window's cells in a worker, and the thread that copies slots to them and back, in the order it is told.

What lies in which cell, and for whom, is control's to say (`specd.daemon.lag`).
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import zmq

from specd.memory.arena import HostArena
from specd.memory.cuda import Copier
from specd.memory.device_arena import DeviceArena
from specd.replay.pinned import GB, Pinned, cells_in
from specd.worker import messages as channel

log = logging.getLogger(__name__)


class _Copy(NamedTuple):
    """A copy of `nbytes` bytes between a slot and a cell."""

    note: channel.SaveSlot | channel.LoadSlot
    nbytes: int


class LagCells:
    """The cells of one ring. outbox: makes the thread's own pipe to control. crashed: told why the thread ended.

    Raises ConfigError without memory for `gb` · 10⁹ bytes, or where that is less than a slot.
    """

    def __init__(
        self,
        arena: HostArena | DeviceArena,
        gb: float,
        outbox: Callable[[], zmq.Socket[bytes]],
        crashed: Callable[[str], None],
    ) -> None:
        self._arena = arena
        self._crashed = crashed
        cells = cells_in(round(gb * GB), arena.stride, "--lag-gb")
        self._cells = Pinned(cells, arena.stride, arena.device)
        self._in_slot: dict[int, int] = {}
        self._in_cell: dict[int, int] = {}
        """How many bytes of each count. Both as of the messages that came so far, on the thread that hears them."""
        self._copies: queue.SimpleQueue[_Copy | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(outbox,), name="specd-lag", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return self._cells.cells

    def filling(self, slot: int, nbytes: int) -> None:
        """A slot is going to be filled with so many bytes."""
        self._in_slot[slot] = nbytes

    def copy(self, note: channel.SaveSlot | channel.LoadSlot) -> None:
        """Do what control asks for, behind what it asked for before."""
        if isinstance(note, channel.SaveSlot):
            nbytes = self._in_cell[note.cell] = self._in_slot[note.slot]
        else:
            nbytes = self._in_slot[note.slot] = self._in_cell[note.cell]
        self._copies.put(_Copy(note, nbytes))

    def close(self) -> None:
        """End, before the arena is closed. Idempotent."""
        self._copies.put(None)
        self._thread.join()
        self._cells.close()

    def _run(self, outbox: Callable[[], zmq.Socket[bytes]]) -> None:
        pipe, copier = outbox(), Copier()
        try:
            while (copy := self._copies.get()) is not None:
                note = copy.note
                if isinstance(note, channel.SaveSlot):
                    self._move(copy, copier)
                    # A refill that began under the copy has set it to 0 before it wrote.
                    ok = self._arena.generation(note.slot) == note.generation
                    answer: channel.ToControl = channel.Saved(number=note.number, ok=ok)
                else:
                    self._arena.begin(note.slot)
                    self._move(copy, copier)
                    self._arena.seal(note.slot, note.generation, copy.nbytes)
                    answer = channel.Filled(slot=note.slot, generation=note.generation, target_us=0, replayed=True)
                pipe.send(channel.encode(answer))
        except BaseException:
            log.exception("the lag window failed")
            self._crashed("the lag window failed")
        finally:
            pipe.close(linger=1000)

    def _move(self, copy: _Copy, copier: Copier) -> None:
        """Copy a slot to a cell, or a cell to a slot."""
        note, nbytes = copy
        if isinstance(self._arena, DeviceArena):
            slot, cell = self._arena.tensor(note.slot)[:nbytes], self._cells.tensor(note.cell)[:nbytes]
            into, source = (cell, slot) if isinstance(note, channel.SaveSlot) else (slot, cell)
            copier.copy(into, source)
        else:
            here, there = self._arena.slot(note.slot)[:nbytes], self._cells.view(note.cell)[:nbytes]
            into_, source_ = (there, here) if isinstance(note, channel.SaveSlot) else (here, there)
            np.copyto(np.frombuffer(into_, np.uint8), np.frombuffer(source_, np.uint8))  # lets other threads run

    def __repr__(self) -> str:
        return f"LagCells({self._cells})"
