"""The lag window's cells in a worker, and the thread that copies slots to them and back, in the order it is told.

What lies in which cell, and for whom, is control's to say (`specd.daemon.lag`).
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import NamedTuple

import zmq

from specd.memory.arena import HostArena
from specd.memory.cuda import Copier
from specd.memory.device_arena import DeviceArena
from specd.replay.files import GB
from specd.replay.pinned import Pinned, cells_in
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
        self._crashed = crashed
        self._cells = Pinned(cells_in(round(gb * GB), arena.stride, "--lag-gb"), arena)
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
                note, nbytes = copy
                answer: channel.ToControl
                if isinstance(note, channel.SaveSlot):
                    ok = self._cells.save(note.cell, note.slot, note.generation, nbytes, copier)
                    answer = channel.Saved(number=note.number, ok=ok)
                else:
                    self._cells.load(note.cell, note.slot, note.generation, nbytes, copier)
                    answer = channel.Filled(slot=note.slot, generation=note.generation, target_us=0, replayed=True)
                pipe.send(channel.encode(answer))
        except BaseException:
            log.exception("the lag window failed")
            self._crashed("the lag window failed")
        finally:
            pipe.close(linger=1000)

    def __repr__(self) -> str:
        return f"LagCells({self._cells})"
