"""What the ring's slots hold: finding the content of a request, room for another, and what is kept for others."""

from __future__ import annotations

import logging
from collections import deque
from typing import Final

from specd.daemon.lag import LagWindow, Save
from specd.daemon.shares import Run, Shares
from specd.daemon.slots import Ask, Slot, SlotState
from specd.protocol.capture import covers
from specd.protocol.messages import Source

log = logging.getLogger(__name__)

SPARE: Final = 4
"""One in so many slots: runs that follow one another closely need no copies."""
UNLIKE: Final = 8
"""So many batches that differ are no accident."""
WHY_UNLIKE: Final = (
    "its runs have other batches at the same place, and share nothing there: give all the same data, "
    "data.batch_tokens and train.seed"
)


class Contents:
    """The slots of a ring; it alone says which requests may have one. counters: of the ring."""

    def __init__(self, num_slots: int, shares: Shares, counters: dict[str, int]) -> None:
        self.slots = [Slot() for _ in range(num_slots)]
        self._free = deque(range(num_slots))  # longest free first: a late reader of old bytes sees them longest
        self.spare = max(1, num_slots // SPARE)
        """How many slots are to be FREE, or safe in the lag window, if that can be had."""
        self._serial = 0
        self._resident: dict[bytes, list[int]] = {}  # by content, every slot that is not FREE
        self._shares = shares
        self._counters = counters
        self.lag = LagWindow()

    def find(self, ask: Ask) -> int | None:
        """A slot that holds, or is getting, what a request wants."""
        for index in self._resident.get(ask.batch_id, ()):
            held = self.slots[index].held
            if held == ask.want or (ask.cuts and covers(held, ask.want)):
                return index
        return None

    def join(self, index: int, run: Run) -> Source:
        """A request of a run gets a lease on a slot that was found."""
        slot = self.slots[index]
        self._counters["joins"] += 1
        run.behind = False
        if slot.state is not SlotState.KEPT:
            return "joined"
        slot.state = SlotState.READY
        self._counters["kept_hits"] += 1
        return "kept"

    def fill(self, run: Run, ask: Ask) -> int | None:
        """A slot that is FILLING for a request now, from a cell of the lag window or by a forward.

        None without room, or while its run is held, which it is not for a cell.
        """
        others = self._shares.others(run) if ask.want is not None else set()
        found, unlike = self.lag.find(ask), bool(others) and self._is_unlike(others, ask)
        index = self._room(run, others, ask.place, may_wait=found is None)
        if index is None:
            return None
        self._counters["unlike"] += unlike
        if unlike and self._counters["unlike"] == UNLIKE:
            log.warning("share %s: %s", run.share, WHY_UNLIKE)
        self._counters["fills" if found is None else "lag_hits"] += 1
        self._serial += 1
        slot = self.slots[index]
        slot.state, slot.batch_id, slot.generation = SlotState.FILLING, ask.batch_id, slot.generation + 1
        slot.serial, slot.asker, slot.place, slot.refused = self._serial, run, ask.place, -1
        if found is not None:
            slot.cell, slot.held, slot.owed, run.behind = found.cell, found.held, set(found.owed), False
        else:
            slot.cell, slot.held = None, self._shares.held(run, ask.want) if ask.cuts else ask.want
            slot.owed = {other for other in others if other.reached <= ask.place}
        self._resident.setdefault(ask.batch_id, []).append(index)
        return index

    def leased(self, index: int, run: Run) -> None:
        """A run got a lease on a slot, which it is owed no more."""
        slot = self.slots[index]
        slot.owed.discard(run)
        self.lag.paid(slot.batch_id, run)

    def saves(self) -> list[Save]:
        """The KEPT slots to be copied to the lag window now: the latest ones, until `spare` can be filled at once."""
        if not self.lag.cells:
            return []
        found: list[Save] = []
        kept = [(index, slot) for index, slot in enumerate(self.slots) if slot.state is SlotState.KEPT]
        lost = [(index, slot) for index, slot in kept if not self.lag.has(slot.batch_id, slot.held, saved=False)]
        missing = self.spare - len(self._free) - (len(kept) - len(lost))
        for index, slot in sorted(lost, key=lambda each: each[1].place, reverse=True):
            if len(found) < missing and slot.refused != self.lag.freed:
                if (save := self.lag.save(index, slot)) is not None:
                    found.append(save)
                else:
                    slot.refused = self.lag.freed
        self._counters["lag_saves"] += len(found)
        return found

    def settle(self, index: int) -> None:
        """Keep or free a slot whose content is in place, if it has no lease."""
        slot = self.slots[index]
        if slot.state in (SlotState.READY, SlotState.KEPT) and not slot.leases:
            if slot.owed:
                slot.state = SlotState.KEPT
            else:
                self.vacate(index)

    def forget(self, run: Run) -> None:
        """Nothing is owed a run any more."""
        self.lag.forget(run)
        for index, slot in enumerate(self.slots):
            slot.owed.discard(run)
            self.settle(index)

    def reset(self) -> None:
        """The worker died: every slot is free, and nothing is in the lag window, which the next one brings."""
        self.lag = LagWindow()
        for index, slot in enumerate(self.slots):
            slot.readers.clear()
            if slot.state is not SlotState.FREE:
                self.vacate(index)

    def vacate(self, index: int) -> None:
        """Free a slot."""
        slot = self.slots[index]
        assert not slot.leases | slot.readers, (
            f"slot {index} is freed while leased by {slot.leases}, read by {slot.readers}"
        )
        self._resident[slot.batch_id].remove(index)
        if not self._resident[slot.batch_id]:
            del self._resident[slot.batch_id]
        slot.state, slot.batch_id, slot.held, slot.asker, slot.cell = SlotState.FREE, b"", None, None, None
        slot.owed.clear()
        self._free.append(index)

    def _room(self, run: Run, others: set[Run], place: int, *, may_wait: bool) -> int | None:
        """A FREE slot, made of a KEPT one if need be. others: of its share. may_wait: whether the run may be held."""
        if may_wait and self._follows(others, place) and self._shares.holds(run):
            return None
        if not self._free and not self._evict(run, others, may_wait=may_wait):
            return None
        return self._free.popleft()

    def _follows(self, others: set[Run], place: int) -> bool:
        """Whether another run has a fill of its own being made at an earlier place, and so catches up."""
        filling = (slot for slot in self.slots if slot.state is SlotState.FILLING and slot.asker in others)
        return any(slot.place < place and slot.cell is None for slot in filling)

    def _is_unlike(self, others: set[Run], ask: Ask) -> bool:
        """Whether one of the others has another batch at the same place of its plan."""
        return any(
            slot.asker in others and slot.place == ask.place and slot.batch_id != ask.batch_id for slot in self.slots
        )

    def _evict(self, run: Run, others: set[Run], *, may_wait: bool) -> bool:
        """Free a KEPT slot; False without one, or while the run waits for others of its share to read them.

        One that the lag window has, or else the newest that nobody waits for; else the newest of all, and nobody waits
        any more for those that are owed it. may_wait: whether the run may be held.
        """
        kept = [index for index, slot in enumerate(self.slots) if slot.state is SlotState.KEPT]
        if not kept:
            return False
        safe = [index for index in kept if self._is_safe(index)]
        awaited = {other for other in others if not other.behind}
        free = safe or [index for index in kept if not self.slots[index].owed & awaited]
        if not free and may_wait and self._shares.holds(run):
            return False
        index = max(free or kept, key=lambda each: self.slots[each].serial)
        if not safe:
            for other in self.slots[index].owed & others:
                other.behind = True
            self._counters["kept_evicted"] += 1
        self.vacate(index)
        return True

    def _is_safe(self, index: int) -> bool:
        """Whether a slot's batch can be read from the lag window."""
        return self.lag.has(self.slots[index].batch_id, self.slots[index].held, saved=True)
