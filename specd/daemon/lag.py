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


class SlotCopy:
    """A slot's batch in a cell. held: its states. place: in the plan of who had it made. owed: the runs it is for."""

    __slots__ = ("batch_id", "cell", "held", "number", "owed", "place", "saved")

    def __init__(self, number: int, cell: int, slot: Slot) -> None:
        self.number, self.cell = number, cell
        self.batch_id, self.held, self.place = slot.batch_id, slot.held, slot.place
        self.owed = set(slot.owed)
        self.saved = False

    def __repr__(self) -> str:
        return f"SlotCopy({self.batch_id.hex()[:8]} in cell {self.cell}, for {len(self.owed)} runs)"


class LagWindow:
    """Which batch lies in which cell, and for whom. Pure; the ring's contents own it. cells: 0 for none."""

    def __init__(self, cells: int = 0) -> None:
        self.cells = cells
        self._free = deque(range(cells))
        self._copies: dict[int, SlotCopy] = {}  # by number
        self._by_content: dict[bytes, list[SlotCopy]] = {}
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
    def copies(self) -> list[SlotCopy]:
        """All that it has."""
        return list(self._copies.values())

    def find(self, ask: Ask) -> SlotCopy | None:
        """What a request can be read from."""
        for copy in self._by_content.get(ask.batch_id, ()):
            if copy.saved and (copy.held == ask.want or (ask.cuts and covers(copy.held, ask.want))):
                return copy
        return None

    def has(self, batch_id: bytes, held: CaptureSpec | None, *, saved: bool) -> bool:
        """Whether a slot's batch is here. saved: and can be read."""
        return any(copy.held == held and (copy.saved or not saved) for copy in self._by_content.get(batch_id, ()))

    def save(self, index: int, slot: Slot) -> Save | None:
        """Have a KEPT slot copied; None without a cell for it."""
        if not self._free:
            last = max(self._copies.values(), key=_ahead)
            if _ahead(last) <= _ahead(slot):
                return None
            self._drop(last)
        self._last += 1
        copy = self._copies[self._last] = SlotCopy(self._last, self._free.popleft(), slot)
        self._by_content.setdefault(copy.batch_id, []).append(copy)
        return Save(copy.number, index, slot.generation, copy.cell)

    def saved(self, number: int, ok: bool) -> None:
        """The worker has copied, or could not. Ignored for what is not wanted any more."""
        copy = self._copies.get(number)
        if copy is None:
            return
        if ok:
            copy.saved = True
        else:
            self._drop(copy)

    def paid(self, batch_id: bytes, run: Run) -> None:
        """A run has a lease on a batch."""
        for copy in list(self._by_content.get(batch_id, ())):
            self._pay(copy, run)

    def forget(self, run: Run) -> None:
        """Nothing is owed a run any more."""
        for copy in self.copies:
            self._pay(copy, run)

    def _pay(self, copy: SlotCopy, run: Run) -> None:
        copy.owed.discard(run)
        if not copy.owed:
            self._drop(copy)

    def _drop(self, copy: SlotCopy) -> None:
        del self._copies[copy.number]
        self._by_content[copy.batch_id].remove(copy)
        if not self._by_content[copy.batch_id]:
            del self._by_content[copy.batch_id]
        self._free.append(copy.cell)
        self.freed += 1


def _ahead(one: SlotCopy | Slot) -> float:
    """How many batches the nearest of the runs that are owed it has before it; infinite if all have come past it."""
    return min((one.place - run.reached for run in one.owed if run.reached <= one.place), default=inf)
