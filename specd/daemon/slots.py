"""Slots, leases and holders: the records that the ring keeps, and what it decides."""

from __future__ import annotations

import enum
from collections import deque
from typing import NamedTuple


class Grant(NamedTuple):
    """A slot the worker must fill with a batch. holder, seq: the request that caused it, and has the content."""

    slot: int
    generation: int
    batch_id: bytes
    holder: bytes
    seq: int


class Lease(NamedTuple):
    """The right of one holder to read one generation of a slot. seq: the request it answers."""

    id: int
    holder: bytes
    seq: int
    slot: int
    generation: int
    batch_id: bytes


class Schedule(NamedTuple):
    """What `schedule` decided: slots to fill, and leases that joined a slot whose content is in place."""

    fills: list[Grant]
    ready: list[Lease]


class SlotState(enum.Enum):
    FREE = "free"
    FILLING = "filling"
    READY = "ready"
    QUARANTINED = "quarantined"


class Slot:
    """leases: ids of all leases on it. readers: why it is QUARANTINED. batch_id: its content, empty when FREE."""

    __slots__ = ("batch_id", "generation", "leases", "readers", "state")

    def __init__(self) -> None:
        self.state = SlotState.FREE
        self.generation = 0
        self.batch_id = b""
        self.leases: set[int] = set()
        self.readers: set[int] = set()


class Holder:
    """queue: (seq, batch id) of requests without a lease. seqs: of all outstanding requests. borrowed: lease ids."""

    __slots__ = ("borrowed", "credits", "deadline", "leases", "queue", "reader", "seqs")

    def __init__(self, credits: int, reader: int) -> None:
        self.credits = credits
        self.reader = reader
        self.borrowed: set[int] = set()
        self.deadline = 0.0
        self.queue: deque[tuple[int, bytes]] = deque()
        self.leases: dict[int, Lease] = {}
        self.seqs: set[int] = set()
