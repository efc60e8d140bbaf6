"""The lag window: batches that a run of a share was done with before others had them, in cells of the worker's memory.

Where few slots can be filled at once, KEPT ones are copied to cells. From then on they may be filled anew without a
loss: who lags reads a batch from its cell, and no forward is made for it again.

    FREE ──a slot is kept──▶ SAVING ──saved──▶ SAVED ──nobody is owed it──▶ FREE
                                └──the slot was filled anew under the copy──▶ FREE

Without a free cell, the batch that is needed last is the one that is not saved, or is given up: that is how far it lies
ahead of the nearest run that is owed it. If one lags, that is the newest; if two do, who is nearer goes first.

The worker copies in the order in which it is told, so a cell may be claimed again while it is still to be read.
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import NamedTuple

from specd.daemon.shares import Run
from specd.daemon.slots import Ask, Slot
from specd.protocol.capture import CaptureSpec, covers


class Save(NamedTuple):
    """A slot that the worker must copy to a cell. number: of this save, for its answer."""

    number: int
    slot: int
    generation: int
    cell: int


class Entry:
    """A batch in a cell. held: its states. place: in the plan of who had it made. owed: the runs it is for."""

    __slots__ = ("batch_id", "cell", "held", "number", "owed", "place", "saved")

    def __init__(self, number: int, cell: int, slot: Slot) -> None:
        self.number, self.cell = number, cell
        self.batch_id, self.held, self.place = slot.batch_id, slot.held, slot.place
        self.owed = set(slot.owed)
        self.saved = False

    def __repr__(self) -> str:
        return f"Entry({self.batch_id.hex()[:8]} in cell {self.cell}, for {len(self.owed)} runs)"


class LagWindow:
    """Which batch lies in which cell, and for whom. Pure; the ring's contents own it. cells: 0 for none."""

    def __init__(self, cells: int = 0) -> None:
        self.cells = cells
        self._free = deque(range(cells))
        self._entries: dict[int, Entry] = {}  # by number
        self._by_content: dict[bytes, list[Entry]] = {}
        self._last = 0
        self.freed = 0
        """How many cells were freed so far: as long as that is the same, what found no cell need not ask again."""

    def __repr__(self) -> str:
        return f"LagWindow({self.used} of {self.cells} cells)"

    @property
    def used(self) -> int:
        """Cells that hold a batch, or are getting one."""
        return self.cells - len(self._free)

    @property
    def entries(self) -> list[Entry]:
        """All that it has."""
        return list(self._entries.values())

    def find(self, ask: Ask) -> Entry | None:
        """What a request can be read from."""
        for entry in self._by_content.get(ask.batch_id, ()):
            if entry.saved and (entry.held == ask.want or (ask.cuts and covers(entry.held, ask.want))):
                return entry
        return None

    def has(self, batch_id: bytes, held: CaptureSpec | None, *, saved: bool) -> bool:
        """Whether a slot's batch is here. saved: and can be read."""
        return any(entry.held == held and (entry.saved or not saved) for entry in self._by_content.get(batch_id, ()))

    def save(self, index: int, slot: Slot) -> Save | None:
        """Have a KEPT slot copied; None without a cell for it."""
        if not self._free:
            last = max(self._entries.values(), key=_ahead)
            if _ahead(last) <= _ahead(slot):
                return None
            self._drop(last)
        self._last += 1
        entry = self._entries[self._last] = Entry(self._last, self._free.popleft(), slot)
        self._by_content.setdefault(entry.batch_id, []).append(entry)
        return Save(entry.number, index, slot.generation, entry.cell)

    def saved(self, number: int, ok: bool) -> None:
        """The worker has copied, or could not. Ignored for what is not wanted any more."""
        entry = self._entries.get(number)
        if entry is None:
            return
        if ok:
            entry.saved = True
        else:
            self._drop(entry)

    def paid(self, batch_id: bytes, run: Run) -> None:
        """A run has a lease on a batch."""
        for entry in list(self._by_content.get(batch_id, ())):
            self._pay(entry, run)

    def forget(self, run: Run) -> None:
        """Nothing is owed a run any more."""
        for entry in self.entries:
            self._pay(entry, run)

    def _pay(self, entry: Entry, run: Run) -> None:
        entry.owed.discard(run)
        if not entry.owed:
            self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        del self._entries[entry.number]
        self._by_content[entry.batch_id].remove(entry)
        if not self._by_content[entry.batch_id]:
            del self._by_content[entry.batch_id]
        self._free.append(entry.cell)
        self.freed += 1


def _ahead(one: Entry | Slot) -> float:
    """How many batches the nearest of the runs that are owed it has before it; infinite if all have come past it."""
    return min((one.place - run.reached for run in one.owed if run.reached <= one.place), default=inf)
