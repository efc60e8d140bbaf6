"""Rings, and a worker that fills all it is asked to, for tests."""

from __future__ import annotations

from specd.daemon.ring import Ring
from specd.daemon.slots import Lease

A, B, C = b"a", b"b", b"c"


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(num_slots: int = 4, max_holders: int = 2, ttl_s: float = 10.0) -> tuple[Ring, Clock]:
    clock = Clock()
    return Ring(num_slots, max_holders, ttl_s, clock), clock


def content(number: int) -> bytes:
    return number.to_bytes(16, "big")


def fill_all(ring: Ring) -> list[Lease]:
    """Schedule, and let the worker fill everything it was asked for; returns every lease to announce."""
    schedule = ring.schedule()
    return [*schedule.ready, *(lease for fill in schedule.fills for lease in ring.filled(fill.slot, fill.generation))]
