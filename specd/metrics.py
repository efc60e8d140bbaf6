"""Counters: the control loop's event counts and the subscriber's cumulative statistics."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import msgspec


class Counters:
    """Named counts that only go up; thread-safe. Names are declared: a typo fails, and a report is complete."""

    __slots__ = ("_counts", "_lock")

    def __init__(self, names: Iterable[str]) -> None:
        self._counts = dict.fromkeys(names, 0)
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Counters({', '.join(f'{name}={count}' for name, count in self.values().items() if count)})"

    def add(self, name: str, amount: int = 1) -> None:
        """Count `amount` ≥ 0 events."""
        assert name in self._counts, f"counter {name!r} is not declared"
        assert amount >= 0, f"counter {name!r} only goes up, not by {amount}"
        with self._lock:
            self._counts[name] += amount

    def __getitem__(self, name: str) -> int:
        assert name in self._counts, f"counter {name!r} is not declared"
        return self._counts[name]

    def values(self) -> dict[str, int]:
        """All counts at one moment, in the order they were declared."""
        with self._lock:
            return dict(self._counts)


class Stats(msgspec.Struct, kw_only=True):
    """Cumulative statistics of a subscriber; times in seconds.

    target_wait_s: the trainer waited while its next batch was still being computed (target-bound).
    wire_wait_s: it waited while its next batch was READY but not fetched (wire-bound).
    batches, tokens, nbytes: delivered. fetch_s, forward_s: of the same batches, the time inside `transport.fetch`,
    overlapped or not, and their share of the target's forwards, as in READY.
    shared: batches that no forward was made for, as another trainer had asked for them. replayed: those that none was
    made for as their daemon had kept their states.
    busy_slots, num_slots: the rings' occupancy as last reported. transports: endpoint → transport in use.
    """

    batches: int = 0
    tokens: int = 0
    nbytes: int = 0
    target_wait_s: float = 0.0
    wire_wait_s: float = 0.0
    fetch_s: float = 0.0
    forward_s: float = 0.0
    shared: int = 0
    replayed: int = 0
    resubmitted: int = 0
    reconnects: int = 0
    busy_slots: int = 0
    num_slots: int = 0
    transports: dict[str, str] = {}

    def difference(self, earlier: Stats) -> Stats:
        """The change since `earlier`: sums are subtracted, ring occupancy and transports stay the latest."""
        return msgspec.structs.replace(
            self,
            batches=self.batches - earlier.batches,
            tokens=self.tokens - earlier.tokens,
            nbytes=self.nbytes - earlier.nbytes,
            target_wait_s=self.target_wait_s - earlier.target_wait_s,
            wire_wait_s=self.wire_wait_s - earlier.wire_wait_s,
            fetch_s=self.fetch_s - earlier.fetch_s,
            forward_s=self.forward_s - earlier.forward_s,
            shared=self.shared - earlier.shared,
            replayed=self.replayed - earlier.replayed,
            resubmitted=self.resubmitted - earlier.resubmitted,
            reconnects=self.reconnects - earlier.reconnects,
        )
