"""The ring's bookkeeping: slots, generations, leases and credits as a pure state machine with an injected clock.

A *holder* is one trainer session. It has credits, a FIFO queue of requests, leases, and one deadline that every valid
call of it renews. A request waits in its holder's queue until `schedule` gives it a lease: on a free slot, which the
worker then fills, or on the slot that holds or is getting the same content already (it *joins* that slot).

    FREE ──schedule──▶ FILLING ──filled──▶ READY ──last lease ends──▶ FREE
                          └──failed, or filled after its last lease ended──▶ FREE

**The slot guarantee.** With N slots and at most M holders, P = N − M slots form a shared pool. h is a holder's number
of leases; *extras* = Σ max(h − 1, 0); an *orphan* is a FILLING slot without a lease (its holders are gone, but the
worker still writes to it, so nobody may have it). A holder with h > 0 gets another lease, joined or not, only if
afterwards extras + orphans ≤ P; a holder with h = 0 only needs a free slot or one to join.

Proof that a holder with h = 0 finds a slot: used slots ≤ Σh + orphans ≤ extras + (M − 1) + orphans, and always
extras ≤ P, so without orphans used ≤ N − 1. Orphans come only from closed or expired holders, end when the worker
reports the slot, and extras never take the place they still occupy: the slot is there at once, or as soon as the
worker answers.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from specd.errors import ConfigError, ProtocolError

COUNTERS = ("submitted", "fills", "joins", "released", "stale_release", "stale_fill", "expired", "resets")


class SlotFill(NamedTuple):
    """A slot the worker must fill with a batch. holder, seq: the request that gave the cause, and has the content."""

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
    """What `schedule` decided: slots to fill, and leases that joined a slot which is READY already."""

    fills: list[SlotFill]
    ready: list[Lease]


class _State(enum.Enum):
    FREE = "free"
    FILLING = "filling"
    READY = "ready"


class _Slot:
    """leases: ids of all leases on it. batch_id: its content, empty when FREE."""

    __slots__ = ("batch_id", "generation", "leases", "state")

    def __init__(self) -> None:
        self.state = _State.FREE
        self.generation = 0
        self.batch_id = b""
        self.leases: set[int] = set()


class _Holder:
    """queue: (seq, batch id) of requests without a lease. seqs: of all outstanding requests."""

    __slots__ = ("credits", "deadline", "leases", "queue", "seqs")

    def __init__(self, credits: int) -> None:
        self.credits = credits
        self.deadline = 0.0
        self.queue: deque[tuple[int, bytes]] = deque()
        self.leases: dict[int, Lease] = {}
        self.seqs: set[int] = set()


class Ring:
    """Slots, leases and credits of one daemon. Not thread-safe: the control loop owns it."""

    def __init__(self, num_slots: int, max_holders: int, ttl_s: float, clock: Callable[[], float]) -> None:
        """ttl_s: a holder that makes no valid call for so long expires. clock: monotonic seconds."""
        if not 1 <= max_holders <= num_slots:
            raise ConfigError(
                f"a ring of {num_slots} slots cannot give {max_holders} sessions a slot each: "
                f"set ring.max_sessions to at least 1 and ring.slots to at least ring.max_sessions"
            )
        if ttl_s <= 0:
            raise ConfigError(f"a lease that lives {ttl_s} s is over at once: set ring.lease_ttl_s above 0")
        self.num_slots = num_slots
        self.max_holders = max_holders
        self.pool = num_slots - max_holders
        self._ttl_s = ttl_s
        self._clock = clock
        self._slots = [_Slot() for _ in range(num_slots)]
        self._free = deque(range(num_slots))  # longest free first: a late reader of old bytes sees them longest
        self._resident: dict[bytes, int] = {}  # content of every slot that is not FREE
        self._holders: dict[bytes, _Holder] = {}
        self._turns: deque[bytes] = deque()  # whose turn it is to be served, next one first
        self._leases: dict[int, Lease] = {}
        self._last_lease = 0
        self.counters: dict[str, int] = dict.fromkeys(COUNTERS, 0)

    def __repr__(self) -> str:
        states = ", ".join(f"{count} {name}" for name, count in self.counts().items())
        return f"Ring({self.num_slots} slots: {states}; {len(self._holders)} holders, {self.queued()} queued)"

    # Holders

    def open(self, holder: bytes, credits: int) -> int | None:
        """Let `holder` in and return the credits it gets, at most 1 + pool; None when max_holders are in.

        A holder that is in already is closed first: its old requests and leases are void.
        """
        self.close(holder)
        if len(self._holders) >= self.max_holders:
            return None
        granted = max(1, min(credits, 1 + self.pool))
        self._holders[holder] = _Holder(granted)
        self._turns.append(holder)  # behind everyone: opening anew never jumps the queue
        self.renew(holder)
        return granted

    def close(self, holder: bytes) -> None:
        """Drop the holder's requests and leases. An unknown holder is a no-op."""
        state = self._holders.get(holder)
        if state is None:
            return
        for lease in list(state.leases.values()):
            self._end(lease)
        del self._holders[holder]
        self._turns.remove(holder)

    def renew(self, holder: bytes) -> bool:
        """Put the holder's deadline off to ttl_s from now; False when it is not in."""
        state = self._holders.get(holder)
        if state is None:
            return False
        state.deadline = self._clock() + self._ttl_s
        return True

    def next_deadline(self) -> float | None:
        """When the next holder expires, in the clock's seconds; None without holders."""
        return min((state.deadline for state in self._holders.values()), default=None)

    def expire(self) -> list[bytes]:
        """Close the holders whose deadline has come, and return them."""
        now = self._clock()
        expired = [holder for holder, state in self._holders.items() if state.deadline <= now]
        for holder in expired:
            self.close(holder)
        self.counters["expired"] += len(expired)
        return expired

    def reset(self) -> list[bytes]:
        """The worker died: every slot is FREE, every holder closed; returns them. Generations and ids keep counting."""
        closed = list(self._holders)
        for holder in closed:
            self.close(holder)
        for index, slot in enumerate(self._slots):
            if slot.state is not _State.FREE:
                self._vacate(index)
        self.counters["resets"] += 1
        return closed

    # Requests

    def submit(self, holder: bytes, seq: int, batch_id: bytes) -> None:
        """Queue a request and renew its holder.

        Raises ProtocolError for an unknown holder, for one without a credit left, and for a seq that is outstanding.
        """
        state = self._holders.get(holder)
        if state is None:
            raise ProtocolError("submit without an open session: say HELLO first")
        if seq in state.seqs:
            raise ProtocolError(f"seq {seq} is outstanding already: number each request anew")
        if len(state.seqs) >= state.credits:
            raise ProtocolError(
                f"submit of seq {seq} with {len(state.seqs)} requests outstanding and {state.credits} credits: "
                f"release a lease first"
            )
        state.seqs.add(seq)
        state.queue.append((seq, batch_id))
        self.counters["submitted"] += 1
        self.renew(holder)

    def schedule(self) -> Schedule:
        """Give leases to queued requests: round-robin over holders, in order inside one, until nothing more fits."""
        schedule = Schedule([], [])
        passed = 0
        while passed < len(self._turns):
            holder = self._turns[0]
            self._turns.rotate(-1)
            passed = 0 if self._grant(holder, schedule) else passed + 1
        return schedule

    def filled(self, slot: int, generation: int) -> list[Lease]:
        """The worker filled a slot: it is READY; returns its leases to announce. Anything stale is a counted no-op."""
        found = self._filling(slot, generation)
        if found is None:
            return []
        if not found.leases:
            self._vacate(slot)
            return []
        found.state = _State.READY
        return [self._leases[lease] for lease in sorted(found.leases)]

    def failed(self, slot: int, generation: int) -> list[Lease]:
        """The worker could not fill a slot: it is FREE, and the requests it stood for, returned, are over."""
        found = self._filling(slot, generation)
        if found is None:
            return []
        leases = [self._leases[lease] for lease in sorted(found.leases)]
        for lease in leases:
            self._end(lease)
        self._vacate(slot)
        return leases

    def wanted(self, slot: int, generation: int) -> bool:
        """Whether somebody still waits for this fill; if not, `failed` may be reported without running it."""
        found = self._slots[slot]
        return found.state is _State.FILLING and found.generation == generation and bool(found.leases)

    # Leases

    def lease(self, holder: bytes, lease: int) -> Lease | None:
        """The holder's own lease of a READY slot, or None for anything else."""
        found = self._leases.get(lease)
        if found is None or found.holder != holder or self._slots[found.slot].state is not _State.READY:
            return None
        return found

    def release(self, holder: bytes, lease: int) -> bool:
        """End the holder's own lease of a READY slot and renew the holder. False, counted, for anything else."""
        found = self.lease(holder, lease)
        if found is None:
            self.counters["stale_release"] += 1
            return False
        self._end(found)
        self.counters["released"] += 1
        self.renew(holder)
        return True

    # What is going on

    @property
    def holders(self) -> list[bytes]:
        """The holders that are in."""
        return list(self._holders)

    @property
    def busy(self) -> int:
        """Slots that are not FREE."""
        return self.num_slots - len(self._free)

    def outstanding(self, holder: bytes) -> int:
        """The holder's requests that are queued, being filled or leased; 0 when it is not in."""
        state = self._holders.get(holder)
        return len(state.seqs) if state else 0

    def leases(self, holder: bytes) -> list[Lease]:
        """The holder's leases, oldest first, of FILLING and READY slots."""
        state = self._holders.get(holder)
        return list(state.leases.values()) if state else []

    def queued(self) -> int:
        """Requests that wait for a slot, of all holders."""
        return sum(len(state.queue) for state in self._holders.values())

    def counts(self) -> dict[str, int]:
        """How many slots are in each state: free, filling, ready."""
        states = [slot.state for slot in self._slots]
        return {state.value: states.count(state) for state in _State}

    # Transitions

    def _grant(self, name: bytes, schedule: Schedule) -> bool:
        """Give the holder's oldest request a lease if the guarantee allows it."""
        holder = self._holders[name]
        if not holder.queue:
            return False
        seq, batch_id = holder.queue[0]
        index = self._resident.get(batch_id)
        if index is None and not self._free:
            return False
        if holder.leases and self._pool_left() + (index is not None and self._orphaned(index)) < 1:
            return False
        holder.queue.popleft()
        if index is None:
            index = self._free.popleft()
            slot = self._slots[index]
            slot.state, slot.batch_id, slot.generation = _State.FILLING, batch_id, slot.generation + 1
            self._resident[batch_id] = index
            schedule.fills.append(SlotFill(index, slot.generation, batch_id, name, seq))
            self.counters["fills"] += 1
        else:
            slot = self._slots[index]
            self.counters["joins"] += 1
        self._last_lease += 1
        lease = Lease(self._last_lease, name, seq, index, slot.generation, batch_id)
        self._leases[lease.id] = holder.leases[lease.id] = lease
        slot.leases.add(lease.id)
        if slot.state is _State.READY:
            schedule.ready.append(lease)
        return True

    def _pool_left(self) -> int:
        """pool − extras − orphans; negative while orphans sit in slots that were some holder's only one."""
        extras = sum(max(len(holder.leases) - 1, 0) for holder in self._holders.values())
        return self.pool - extras - sum(self._orphaned(index) for index in range(self.num_slots))

    def _orphaned(self, index: int) -> bool:
        slot = self._slots[index]
        return slot.state is _State.FILLING and not slot.leases

    def _filling(self, index: int, generation: int) -> _Slot | None:
        """The slot the worker reports on, or None, counted, when the report is of another time."""
        if 0 <= index < self.num_slots:
            slot = self._slots[index]
            if slot.state is _State.FILLING and slot.generation == generation:
                return slot
        self.counters["stale_fill"] += 1
        return None

    def _end(self, lease: Lease) -> None:
        """Take a lease away. A READY slot goes with its last lease; a FILLING one waits for the worker's report."""
        holder, slot = self._holders[lease.holder], self._slots[lease.slot]
        del self._leases[lease.id], holder.leases[lease.id]
        holder.seqs.remove(lease.seq)
        slot.leases.remove(lease.id)
        if not slot.leases and slot.state is _State.READY:
            self._vacate(lease.slot)

    def _vacate(self, index: int) -> None:
        slot = self._slots[index]
        assert not slot.leases, f"slot {index} has leases {slot.leases} and is given away"
        del self._resident[slot.batch_id]
        slot.state, slot.batch_id = _State.FREE, b""
        self._free.append(index)
