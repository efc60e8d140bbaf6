"""Which batch lies in which cell: a pure state machine, without I/O, threads or a clock.

    ABSENT ──claim──▶ WRITING ──stored──▶ STORED ──drop──▶ DEAD ──last reader done──▶ ABSENT
                         └──abandon──▶ ABSENT

A fixed part is kept: once every cell is taken no further batch is stored, and what is stored stays. A batch comes once
an epoch, so a hit has to be carried over an epoch's end, and only as much can be carried as fits: no policy has more
hits, whatever the order, and any that evicts writes the same cells again and again.

Only the cell of an *old* batch is given to another: one that nobody asked for during the last `horizon` lookups, as
those of an earlier run.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Mapping

COUNTS = ("hit", "miss", "wrote", "skipped", "damaged")
"""hit: batches read from the tier. miss: batches computed that it would keep. wrote: batches kept. skipped: those that
were not, though there was room, or as no cell is so large. damaged: cells whose bytes were not what was written."""


class State(enum.Enum):
    WRITING = "writing"
    STORED = "stored"
    DEAD = "dead"
    ABSENT = "absent"


class Entry:
    """A batch and its cell. readers: who holds it. seen: the last lookup that found it, or that it was written at."""

    __slots__ = ("cell", "key", "readers", "seen", "state")

    def __init__(self, key: bytes, cell: int, state: State, seen: int) -> None:
        self.key, self.cell, self.state, self.seen = key, cell, state, seen
        self.readers = 0

    def __repr__(self) -> str:
        return f"Entry({self.key.hex()[:8]} in cell {self.cell}, {self.state.value}, {self.readers} readers)"


class Store:
    """The cells of one tier. Not thread-safe. horizon: see the module; 4 × cells until somebody knows better."""

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self.horizon = 4 * cells
        self._free = deque(range(cells))
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # least recently seen first
        self._lookups = self._writing = 0

    def __repr__(self) -> str:
        return f"Store({self.used} of {self.cells} cells hold a batch, {self._writing} are being written)"

    @property
    def used(self) -> int:
        """Cells that hold a batch."""
        return len(self._entries) - self._writing

    def __contains__(self, key: bytes) -> bool:
        """Whether a batch is stored, or being written."""
        return key in self._entries

    def turn(self) -> None:
        """Somebody looks for a batch of an epoch, here or elsewhere."""
        self._lookups += 1

    def look(self, key: bytes) -> Entry | None:
        """A stored batch, held for its reader until `done`; None if it is not here."""
        entry = self._entries.get(key)
        if entry is None or entry.state is not State.STORED:
            return None
        entry.readers += 1
        entry.seen = self._lookups
        self._entries.move_to_end(key)
        return entry

    def done(self, entry: Entry) -> None:
        """A reader of `look` has read."""
        assert entry.readers > 0, entry
        entry.readers -= 1
        self._settle(entry)

    def drop(self, entry: Entry) -> None:
        """Its bytes are worthless: nobody finds it any more. Idempotent; its cell is free after its last reader."""
        if entry.state is State.STORED:
            entry.state = State.DEAD
            del self._entries[entry.key]
            self._settle(entry)

    def claim(self, key: bytes) -> Entry | None:
        """A cell to write a batch into, until `stored` or `abandon`; None without room, and if it is here already."""
        if key in self._entries:
            return None
        if not self._free and (old := self._oldest()) is not None:
            self.drop(old)
        if not self._free:
            return None
        entry = self._entries[key] = Entry(key, self._free.popleft(), State.WRITING, self._lookups)
        self._writing += 1
        return entry

    def stored(self, entry: Entry) -> None:
        """All bytes of a claimed cell are written."""
        assert entry.state is State.WRITING, entry
        entry.state = State.STORED
        self._writing -= 1

    def abandon(self, entry: Entry) -> None:
        """A claimed cell was not written."""
        assert entry.state is State.WRITING, entry
        self._writing -= 1
        entry.state = State.DEAD
        del self._entries[entry.key]
        self._settle(entry)

    def load(self, found: Mapping[int, bytes]) -> None:
        """Batches lie in these cells since before; one that lies in two is taken once. Only before the first claim."""
        for cell, key in found.items():
            self._entries.setdefault(key, Entry(key, cell, State.STORED, self._lookups))
        taken = {entry.cell for entry in self._entries.values()}
        self._free = deque(cell for cell in range(self.cells) if cell not in taken)

    def _oldest(self) -> Entry | None:
        """An entry whose cell another may have."""
        entry = next(iter(self._entries.values()), None)
        if entry is None or entry.readers or entry.state is not State.STORED:
            return None  # it was just seen, and so were all others
        return entry if self._lookups - entry.seen > self.horizon else None

    def _settle(self, entry: Entry) -> None:
        if entry.state is State.DEAD and not entry.readers:
            entry.state = State.ABSENT
            # Next: a damaged batch is written over its own remains, which a start would otherwise find first.
            self._free.appendleft(entry.cell)
