"""Slots, leases and holders: the records that the ring keeps, and what it decides."""

from __future__ import annotations

import enum
from collections import deque
from typing import NamedTuple

from specd.daemon.shares import Run
from specd.protocol.capture import CaptureSpec
from specd.protocol.messages import Source


class Grant(NamedTuple):
    """A slot the worker must fill with a batch. holder, seq: the request that caused it, and has the content.

    held: the states that are captured, at least those it wants; None for a probe. cell: of the lag window, which has
    them already; None if they are to be captured.
    """

    slot: int
    generation: int
    batch_id: bytes
    holder: bytes
    seq: int
    held: CaptureSpec | None = None
    cell: int | None = None


class Ask(NamedTuple):
    """A request without a lease. want: its states. place: in its run's plan. cuts: a slot that holds more will do."""

    seq: int
    batch_id: bytes
    want: CaptureSpec | None = None
    place: int = 0
    cuts: bool = True


class Lease(NamedTuple):
    """The right of one holder to read one generation of a slot. seq: the request it answers.

    held: all states in the slot. source: whether it caused the forward, joined it or its slot, or found them kept.
    """

    id: int
    holder: bytes
    seq: int
    slot: int
    generation: int
    batch_id: bytes
    held: CaptureSpec | None = None
    source: Source = "forward"


class Schedule(NamedTuple):
    """What `schedule` decided: slots to fill, and leases that joined a slot whose content is in place."""

    fills: list[Grant]
    ready: list[Lease]


class SlotState(enum.Enum):
    FREE = "free"
    FILLING = "filling"
    READY = "ready"
    KEPT = "kept"
    QUARANTINED = "quarantined"


class Slot:
    """leases: ids of all leases on it. readers: why it is QUARANTINED. batch_id: its content, empty when FREE.

    held: its states. serial: of the fill, higher for a later one. asker, place: whose request caused it, and where that
    stands. owed: the runs of the asker's share that have not had it yet. cell: of the lag window, where it came from;
    refused: when that had no cell for it, by what it had freed until then.
    """

    __slots__ = (
        "asker", "batch_id", "cell", "generation", "held", "leases", "owed", "place", "readers", "refused",
        "serial", "state",
    )  # fmt: skip

    def __init__(self) -> None:
        self.state = SlotState.FREE
        self.generation = self.serial = self.place = 0
        self.refused = -1
        self.batch_id = b""
        self.held: CaptureSpec | None = None
        self.asker: Run | None = None
        self.cell: int | None = None
        self.leases: set[int] = set()
        self.readers: set[int] = set()
        self.owed: set[Run] = set()


class Holder:
    """queue: requests without a lease. seqs: of all outstanding requests. borrowed: lease ids. run: that it is of."""

    __slots__ = ("borrowed", "credits", "deadline", "leases", "queue", "reader", "run", "seqs")

    def __init__(self, credits: int, reader: int, run: Run) -> None:
        self.credits = credits
        self.reader = reader
        self.run = run
        self.borrowed: set[int] = set()
        self.deadline = 0.0
        self.queue: deque[Ask] = deque()
        self.leases: dict[int, Lease] = {}
        self.seqs: set[int] = set()
