"""The account of a daemon: what it counts, and where its worker's time goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from specd.metrics import Counters
from specd.protocol.batch import Layout
from specd.replay.store import COUNTS

FILLING, NO_SLOT, NO_REQUEST, DOWN = "filling_us", "no_slot_us", "no_request_us", "down_us"
REPLAY = {name: f"replay_{name}" for name in COUNTS}
"""What becomes of batches that are kept over epochs, by the worker's names."""
COUNTERS = (
    "batches", "tokens", "bytes", "failed", "refused_messages", "revoked_sessions", "idle_connections",
    "worker_restarts", "forward_us", *REPLAY.values(), FILLING, NO_SLOT, NO_REQUEST, DOWN,
)  # fmt: skip
"""batches, tokens, bytes: announced as READY, once for each trainer. forward_us: of the target's forwards, in
microseconds, once for each fill. The last four add up to the daemon's age: the worker had batches to capture; requests
waited, and every slot was held by trainers or kept for some; no trainer asked for anything; there was no worker."""


class Account:
    """Counts what happens, and the time between two turns of the loop as what the worker did at the first.

    Not thread-safe, but for `counters`. clock: monotonic seconds. began: when the daemon did, by it.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.counters = Counters(COUNTERS)
        self._clock = clock
        self._state = DOWN
        self.began = self._since = clock()

    def turn(self, *, up: bool, filling: bool, queued: bool) -> None:
        """A turn of the loop is over. up: there is a worker. filling: it has batches. queued: some wait for a slot."""
        self.settle()
        self._state = DOWN if not up else FILLING if filling else NO_SLOT if queued else NO_REQUEST

    def served(self, layout: Layout) -> None:
        """A batch was announced to a trainer."""
        for name, amount in (("batches", 1), ("tokens", layout.tensors[0].shape[0]), ("bytes", layout.nbytes)):
            self.counters.add(name, amount)

    def replay(self, counts: Mapping[str, int]) -> None:
        """What became of batches that are, or could be, kept over epochs. counts: by the worker's names."""
        for name, count in counts.items():
            self.counters.add(REPLAY[name], count)

    def settle(self) -> float:
        """Count the time up to now, and return it."""
        now = self._clock()
        passed = int((now - self._since) * 1e6)
        self.counters.add(self._state, passed)
        self._since += passed / 1e6
        return now
