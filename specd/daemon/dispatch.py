"""Dispatch: which fills the worker has now, which wait, what killed it, and whether it hangs. Pure, with a clock.

**Poison.** A batch may kill the worker: by an illegal access on the device, or a host out of memory. All batches that
it had when it died are *suspects*. A suspect runs alone: it is sent when the worker has nothing else, and nothing is
sent beside it. If it is filled, it is cleared. If the worker dies of it alone for the second time, it is *poison*, and
is never run again. So the others only wait, and whoever asked for the poison is told.

**Hanging.** A worker that has had work for longer than `limit_s` since it last finished any is hung: max(hang_s,
20 × the median of its fills), the median by time, as fills that share a forward end together. Before its first fill it
may compile: until then it has ten times its own load time, at least 10 × hang_s.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
"""What is sent to the worker for a fill."""
PATIENCE = 20
"""Of this many medians."""
FIRST = 10
"""Of this many load times, or times hang_s, for the first fill of a life."""
DEATHS = 2
"""A batch that the worker died of so often, while it had no other, is poison."""
REMEMBERED = 1024
"""Batches that are suspects or poison; beyond that the oldest are forgotten."""
MEASURED = 64


class Fill(NamedTuple, Generic[T]):
    """A slot to be filled with a batch. task: what tells the worker."""

    slot: int
    generation: int
    batch_id: bytes
    task: T


class Dispatch(Generic[T]):
    """The fills of one daemon, over all lives of its worker. hang_s: see the module. clock: monotonic seconds."""

    def __init__(self, hang_s: float, clock: Callable[[], float]) -> None:
        self._hang_s = hang_s
        self._clock = clock
        self._waiting: deque[Fill[T]] = deque()
        self._running: dict[tuple[int, int], Fill[T]] = {}
        self._deaths: OrderedDict[bytes, int] = OrderedDict()  # of suspects, each while it ran alone
        self._took: deque[float] = deque(maxlen=MEASURED)
        self._load_s = 0.0
        self._since = 0.0  # when the worker last finished a fill, or got one while it had none

    def __repr__(self) -> str:
        return f"Dispatch({len(self._running)} running, {len(self._waiting)} waiting, {len(self._deaths)} suspects)"

    @property
    def busy(self) -> bool:
        """Whether the worker has, or is to get, anything to fill."""
        return bool(self._running or self._waiting)

    def started(self, load_s: float) -> None:
        """A worker serves, after so many seconds."""
        self._load_s = load_s

    def add(self, fill: Fill[T]) -> None:
        """Have a slot filled, in its turn."""
        self._waiting.append(fill)

    def next(self) -> list[Fill[T]]:
        """The fills that the worker is sent now, in order."""
        sent: list[Fill[T]] = []
        while self._waiting:
            alone = self._waiting[0].batch_id in self._deaths
            if self._running and (alone or self._runs_alone()):
                break
            if not self._running:
                self._since = self._clock()
            fill = self._waiting.popleft()
            self._running[fill.slot, fill.generation] = fill
            sent.append(fill)
        return sent

    def done(self, slot: int, generation: int) -> None:
        """The worker reported on a fill: it is no suspect any more. Ignored for one that it does not have."""
        fill = self._running.pop((slot, generation), None)
        if fill is None:
            return
        self._deaths.pop(fill.batch_id, None)
        now = self._clock()
        self._took.append(now - self._since)
        self._since = now

    def died(self) -> None:
        """The worker is dead, and every fill with it."""
        had = [fill.batch_id for fill in self._running.values()]
        for batch_id in had:
            self._deaths[batch_id] = self._deaths.pop(batch_id, 0) + (len(had) == 1)
        while len(self._deaths) > REMEMBERED:
            self._deaths.popitem(last=False)
        self._running.clear()
        self._waiting.clear()
        self._took.clear()

    def poison(self, batch_id: bytes) -> str | None:
        """Why a batch is not run again, or None."""
        if (deaths := self._deaths.get(batch_id, 0)) < DEATHS:
            return None
        return f"the worker died {deaths} times while it captured this batch alone"

    @property
    def limit_s(self) -> float:
        """How long the worker may take now."""
        if not self._took:
            return FIRST * max(self._load_s, self._hang_s)
        return max(self._hang_s, PATIENCE * _median(self._took))

    def hung_at(self) -> float | None:
        """When the worker is hung unless it reports before, in the clock's seconds; None while it has no fill."""
        return self._since + self.limit_s if self._running else None

    def _runs_alone(self) -> bool:
        return any(fill.batch_id in self._deaths for fill in self._running.values())


def _median(values: deque[float]) -> float:
    """The value that half of the time was spent in fills as long as, or longer."""
    rest = sum(values) / 2
    for value in sorted(values, reverse=True):
        rest -= value
        if rest <= 0:
            return value
    return 0.0
