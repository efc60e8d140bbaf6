"""Shares: runs that train on the same batches of one target, and how long each of them may be held for the others.

Trainers that name the same `share` and are open at the same time form it; a *run* is all ranks of one training, or one
trainer alone. What a forward captures is the union of what the members want, fixed when the slot is granted.

**Pace.** A run may be held, that is not get a slot to fill yet, so that others of its share can follow and read what
was captured already. It has a credit for that, a leaky bucket: each lease adds the pace, two forwards a batch, which is
what two runs cost the target that share nothing; time takes it away; it never exceeds `cap`. So over any n leases a run
is held for at most n · pace + cap, whatever the others do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import median

from msgspec.structs import replace

from specd.protocol.capture import CaptureSpec, StateDtype, union

FORWARDS = 2
"""The pace, in forwards a batch."""
CAP_PACES = 16
LEAST_CAP_S = 1.0
MEASURED = 15


class Run:
    """One run. share: empty for one that shares with nobody. specs: of its holders that are in.

    due: until when it may be held, by the clock. held_since: when it began to be, None while it is not. reached: the
    place of its last lease. behind: nobody waits for it.
    """

    __slots__ = ("behind", "due", "held_since", "name", "reached", "share", "specs")

    def __init__(self, name: bytes, share: str, due: float) -> None:
        self.name = name
        self.share = share
        self.specs: dict[bytes, CaptureSpec | None] = {}
        self.due = due
        self.held_since: float | None = None
        self.reached = 0
        self.behind = False

    def __repr__(self) -> str:
        return f"Run({self.name!r}, {self.share!r}, {len(self.specs)} holders)"


class Shares:
    """The runs of all open holders. pace_s: seconds, None for the measured one, 0 never holds. clock: monotonic.

    always: what each forward for a share captures beside what its members want, in whatever dtype they want that.
    """

    def __init__(
        self, clock: Callable[[], float], pace_s: float | None = None, always: CaptureSpec | None = None
    ) -> None:
        self._clock = clock
        self._pace_s = pace_s
        self._always = always
        self._runs: dict[tuple[str, bytes], Run] = {}
        self._waiting: set[Run] = set()
        self._took: deque[float] = deque(maxlen=MEASURED)
        self._warm = False

    def enter(self, holder: bytes, name: bytes, share: str, spec: CaptureSpec | None) -> Run:
        """The run of a holder that comes in. name: of the run, empty for a holder alone."""
        key = (share, name or holder)
        run = self._runs.get(key)
        if run is None:
            run = self._runs[key] = Run(key[1], share, self._clock() + self._cap_s())
        run.specs[holder] = spec
        return run

    def leave(self, holder: bytes, run: Run) -> bool:
        """A holder is over; whether its run is."""
        del run.specs[holder]
        if run.specs:
            return False
        del self._runs[run.share, run.name]
        self._waiting.discard(run)
        return True

    def others(self, run: Run) -> set[Run]:
        """The runs that share with this one."""
        return {each for each in self._runs.values() if run.share and each.share == run.share and each is not run}

    def held(self, run: Run, want: CaptureSpec | None) -> CaptureSpec | None:
        """What a forward for a request of this run captures now."""
        if want is None or not run.share:
            return want
        return union([want, *self.wanted(run.share, want.dtype)])

    def wanted(self, share: str, dtype: StateDtype) -> list[CaptureSpec]:
        """What the open members of a share want, and what is always captured, in that dtype."""
        if not share:
            return []
        always = [] if self._always is None else [replace(self._always, dtype=dtype)]
        runs = (run for run in self._runs.values() if run.share == share)
        return always + [spec for run in runs for spec in run.specs.values() if spec is not None]

    def measured(self, forward_s: float) -> None:
        """A batch took so long. The first one is left out, as it may have compiled."""
        if self._warm and forward_s > 0:
            self._took.append(forward_s)
        self._warm = True

    @property
    def pace_s(self) -> float:
        """Seconds that a run may be held for a lease."""
        if self._pace_s is not None:
            return self._pace_s
        return FORWARDS * median(self._took) if self._took else 0.0

    def _cap_s(self) -> float:
        return 0.0 if self._pace_s == 0 else max(LEAST_CAP_S, CAP_PACES * self.pace_s)

    def leased(self, run: Run, place: int) -> None:
        """A run got a lease: its credit grows."""
        if run.share:
            now = self._clock()
            run.due = min(max(run.due, now) + self.pace_s, now + self._cap_s())
            run.reached = place

    # Who is held, between one look at the requests and the next

    def look(self) -> None:
        """A look at all requests begins."""
        self._waiting.clear()

    def holds(self, run: Run) -> bool:
        """Whether a run that could wait for others is held now."""
        if run.due <= self._clock():
            return False
        self._waiting.add(run)
        return True

    def held_s(self) -> float:
        """The look is over: seconds of the runs that were held until now."""
        now, over = self._clock(), 0.0
        for run in self._runs.values():
            if run in self._waiting and run.held_since is None:
                run.held_since = now
            elif run not in self._waiting and run.held_since is not None:
                over += now - run.held_since
                run.held_since = None
        return over

    def dues(self) -> list[float]:
        """When those that are held need not be any longer, by the clock."""
        return [run.due for run in self._waiting]
