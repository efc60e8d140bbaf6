"""The ring's bookkeeping: slots, generations, leases and credits as a pure state machine with an injected clock.

A *holder* is one trainer session. It has credits, a FIFO queue of requests, leases, and one deadline that every valid
call of it renews. A request waits in its holder's queue until `schedule` gives it a lease: on a free slot, which the
worker then fills, or on the slot that holds or is getting the same content already (it *joins* that slot).

    FREE ──schedule──▶ FILLING ──filled──▶ READY ──last lease ends──▶ FREE, or KEPT while a run is owed it
                          └──failed, or filled after its last lease ended──▶ FREE, or KEPT if it was filled
    KEPT ──a request joins──▶ READY    KEPT ──evicted, or nobody is owed it any more──▶ FREE
    READY ──its holder ends while borrowing it──▶ QUARANTINED ──every such reader is dead──▶ READY, KEPT or FREE

A holder *borrows* a leased slot to read it in place. If it ends without having released it, it may read on: the slot
is quarantined, that is not filled again until the holder's process, its *reader*, is `dead`, or the worker is
(`reset`). Its content stays: leases on it go on, and requests may join it.

**Sharing** (`shares.py`). Holders are of runs, and runs may share. A slot is filled with the union of what its share
wants, and is *owed* to each other run of the share that has not come past its place; a lease of a run pays it. A slot
that was read and is still owed is KEPT. A fill that finds no FREE slot takes a KEPT one: the newest that no other run
of its own share waits for, at once; else its run is held as long as its credit lasts, then takes the newest of all (who
is owed it needs it last), and the runs owed it are *behind*: nobody waits for them until they join a slot again. It is
held as well while another of its share, at an earlier place, has a fill of its own being made. Joins are never held.
With a **lag window** (`lag.py`) KEPT slots are copied to it, and may be taken at once from then on. A fill whose batch
it has is FILLING from there: that makes no forward, so it is not held, and nobody is for it.

**The slot guarantee.** With N slots and at most M holders, P = N − M slots form a shared pool. h is a holder's number
of leases; *extras* = Σ max(h − 1, 0); an *orphan* is a FILLING slot without a lease (its holders are gone, but the
worker still writes to it, so it cannot be reused); Q is the number of QUARANTINED slots. A holder with h > 0 gets
another lease, joined or not, only if afterwards extras + orphans + Q ≤ P; one with h = 0 only needs a free slot or one
to join. A holder is let in only if afterwards holders + extras + Q ≤ N.

Proof that a holder with h = 0 finds a slot. Always holders + extras + Q ≤ N: letting in checks it; a lease beyond the
first leaves extras + Q ≤ P, and holders ≤ M; a holder that ends with b of its h leases borrowed takes 1 from holders
and max(h − 1, 0) from extras and adds at most b ≤ h to Q; nothing else adds to any of them. So used slots ≤ Σh + Q +
orphans ≤ extras + (holders − 1) + Q + orphans, and without orphans used ≤ N − 1. Orphans come only from holders that
ended, end when the worker reports the slot, and extras never take the place they still occupy: the slot is there at
once, or as soon as the worker answers. A KEPT slot has no lease and no reader, and can be evicted: used slots are those
neither FREE nor KEPT. So h = 0 finds a slot as before, but for a wait of at most its run's credit, and that only for
runs of its own share.

So no holder that is in pays for quarantine: the pool pays, then the places of those that ended; while Q > P, Q − P
fewer fit. A reader's quarantined slots count against its credits when it opens again; with 1 + P it is not let in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from specd.daemon.contents import Contents
from specd.daemon.shares import Shares
from specd.daemon.slots import Ask, Grant, Holder, Lease, Schedule, Slot, SlotState
from specd.errors import ConfigError, ProtocolError
from specd.protocol.capture import CaptureSpec
from specd.protocol.messages import Source

COUNTERS = (
    "submitted", "fills", "joins", "kept_hits", "kept_evicted", "lag_hits", "lag_saves", "unlike", "held_ms",
    "released", "stale_release", "stale_fill", "expired", "resets",
)  # fmt: skip


class Ring:
    """Slots, leases and credits of one daemon. Not thread-safe: the control loop owns it."""

    def __init__(
        self,
        num_slots: int,
        max_holders: int,
        ttl_s: float,
        clock: Callable[[], float],
        pace_s: float | None = None,
        always: CaptureSpec | None = None,
    ) -> None:
        """ttl_s: a holder expires this long after its last valid call. clock: monotonic seconds.

        pace_s, always: see Shares.
        """
        if not 1 <= max_holders <= num_slots:
            raise ConfigError(
                f"a ring of {num_slots} slots cannot give {max_holders} sessions a slot each: "
                f"set ring.max_sessions to at least 1 and ring.slots to at least ring.max_sessions"
            )
        if ttl_s <= 0:
            raise ConfigError(f"a lease of {ttl_s} s expires at once: set ring.lease_ttl_s above 0")
        self.num_slots = num_slots
        self.max_holders = max_holders
        self.pool = num_slots - max_holders
        self._ttl_s = ttl_s
        self._clock = clock
        self.counters: dict[str, int] = dict.fromkeys(COUNTERS, 0)
        self.shares = Shares(clock, pace_s, always)
        self.contents = Contents(num_slots, self.shares, self.counters)
        self._slots = self.contents.slots
        self._holders: dict[bytes, Holder] = {}
        self._turns: deque[bytes] = deque()  # whose turn it is to be served, next one first
        self._leases: dict[int, Lease] = {}
        self._last_lease = 0

    def __repr__(self) -> str:
        states = ", ".join(f"{count} {name}" for name, count in self.counts().items())
        return f"Ring({self.num_slots} slots: {states}; {len(self._holders)} holders, {self.queued()} queued)"

    # Holders

    def open(
        self,
        holder: bytes,
        credits: int,
        reader: int = -1,
        *,
        spec: CaptureSpec | None = None,
        share: str = "",
        run: bytes = b"",
    ) -> int | None:
        """Let `holder` in and return its credits, at most 1 + pool; None when there is no room.

        reader: identity of its process; −1 when its death cannot be watched: it cannot borrow then. There is room
        for max_holders, fewer while slots are quarantined, and none for a reader with 1 + pool quarantined slots. A
        holder that is in already is closed first: its old requests and leases are void. spec: what it wants. share: by
        whom forwards are shared, empty for nobody. run: whose rank it is, empty for a run of its own.
        """
        self.close(holder)
        most = 1 + self.pool - self.quarantined(reader)
        taken = len(self._holders) + self._extras() + self.counts()["quarantined"]
        if len(self._holders) >= self.max_holders or taken >= self.num_slots or most < 1:
            return None
        entered = self.shares.enter(holder, run, share, spec)
        state = self._holders[holder] = Holder(max(1, min(credits, most)), reader, entered)
        self._turns.append(holder)  # at the end: reopening never jumps the queue
        self.renew(holder)
        return state.credits

    def close(self, holder: bytes) -> None:
        """Drop the holder's requests and leases; what it borrows is quarantined. An unknown holder is a no-op."""
        state = self._holders.get(holder)
        if state is None:
            return
        for borrowed in state.borrowed:
            slot = self._slots[state.leases[borrowed].slot]
            slot.state = SlotState.QUARANTINED
            slot.readers.add(state.reader)
        for lease in list(state.leases.values()):
            self._end(lease)
        del self._holders[holder]
        self._turns.remove(holder)
        if self.shares.leave(holder, state.run):
            self.contents.forget(state.run)

    def dead(self, reader: int) -> None:
        """End a dead reader's quarantine: a slot held for it alone becomes READY, or FREE without a lease."""
        for index, slot in enumerate(self._slots):
            slot.readers.discard(reader)
            if slot.state is SlotState.QUARANTINED and not slot.readers:
                slot.state = SlotState.READY
                self.contents.settle(index)

    def renew(self, holder: bytes) -> bool:
        """Move the holder's deadline to ttl_s from now; False when it is not in."""
        state = self._holders.get(holder)
        if state is None:
            return False
        state.deadline = self._clock() + self._ttl_s
        return True

    def next_deadline(self) -> float | None:
        """When the next holder expires, or is not held any longer, in the clock's seconds; None without holders."""
        return min([*self.shares.dues(), *(state.deadline for state in self._holders.values())], default=None)

    def expire(self) -> list[bytes]:
        """Close the holders whose deadline has passed, and return them."""
        now = self._clock()
        expired = [holder for holder, state in self._holders.items() if state.deadline <= now]
        for holder in expired:
            self.close(holder)
        self.counters["expired"] += len(expired)
        return expired

    def reset(self) -> None:
        """Free every slot and close every holder: the worker died. Generations and ids keep counting."""
        for holder in list(self._holders):
            self.close(holder)
        self.contents.reset()
        self.counters["resets"] += 1

    # Requests

    def submit(
        self,
        holder: bytes,
        seq: int,
        batch_id: bytes,
        want: CaptureSpec | None = None,
        *,
        place: int = 0,
        cuts: bool = True,
    ) -> None:
        """Queue a request and renew its holder.

        want: the states it wants, None for a probe. place: of the batch in its run's plan. cuts: whether its holder can
        take them out of a slot that holds more.

        Raises ProtocolError for an unknown holder, for one without a credit left, and for a seq that is outstanding.
        """
        state = self.check(holder, seq)
        state.seqs.add(seq)
        state.queue.append(Ask(seq, batch_id, want, place, cuts))
        self.counters["submitted"] += 1
        self.renew(holder)

    def check(self, holder: bytes, seq: int) -> Holder:
        """Raise as `submit` of this seq would, and change nothing."""
        state = self._holders.get(holder)
        if state is None:
            raise ProtocolError("submit without an open session: say HELLO first")
        if seq in state.seqs:
            raise ProtocolError(f"seq {seq} is outstanding already: use a new one for each request")
        if len(state.seqs) >= state.credits:
            raise ProtocolError(
                f"submit of seq {seq} with {len(state.seqs)} requests outstanding and {state.credits} credits: "
                f"release a lease first"
            )
        return state

    def schedule(self) -> Schedule:
        """Give leases to queued requests: round-robin over holders, in order inside one, until nothing more fits."""
        schedule = Schedule([], [])
        self.shares.look()
        passed = 0
        while passed < len(self._turns):
            holder = self._turns[0]
            self._turns.rotate(-1)
            passed = 0 if self._grant(holder, schedule) else passed + 1
        self.counters["held_ms"] += round(1000 * self.shares.held_s())
        return schedule

    def filled(self, slot: int, generation: int, forward_s: float | None = 0.0) -> list[Lease]:
        """Mark a filled slot READY and return its leases to announce. A stale report is a counted no-op.

        forward_s: its share of the forward, None if there was none.
        """
        found = self._filling(slot, generation)
        if found is None:
            return []
        if found.held is not None and forward_s is not None:
            self.shares.measured(forward_s)
        found.state = SlotState.READY
        self.contents.settle(slot)
        return [self._leases[lease] for lease in sorted(found.leases)]

    def failed(self, slot: int, generation: int) -> list[Lease]:
        """Free a slot that the worker could not fill, end the requests on it, and return their leases."""
        found = self._filling(slot, generation)
        if found is None:
            return []
        leases = [self._leases[lease] for lease in sorted(found.leases)]
        for lease in leases:
            self._end(lease)
        self.contents.vacate(slot)
        return leases

    # Leases

    def lease(self, holder: bytes, lease: int) -> Lease | None:
        """The holder's own lease of a slot whose content is in place, or None for anything else."""
        found = self._leases.get(lease)
        if found is None or found.holder != holder or self._slots[found.slot].state is SlotState.FILLING:
            return None
        return found

    def borrow(self, holder: bytes, lease: int) -> None:
        """Mark a lease as read in place until it is released; renews the holder. Idempotent.

        Raises ProtocolError for anything but a lease as `lease` returns it, and for a holder without a reader.
        """
        if self.lease(holder, lease) is None:
            raise ProtocolError(f"lease {lease} cannot be borrowed: expected a READY lease of this session")
        state = self._holders[holder]
        if state.reader < 0:
            raise ProtocolError(
                f"lease {lease} cannot be borrowed: the daemon cannot watch the trainer's process and would not know "
                f"when the slot is no longer read; run both in one pid namespace, or set subscriber.borrow=false"
            )
        state.borrowed.add(lease)
        self.renew(holder)

    def release(self, holder: bytes, lease: int) -> bool:
        """End the holder's own lease, borrowed or not, and renew the holder. False, counted, for anything else."""
        found = self.lease(holder, lease)
        if found is None:
            self.counters["stale_release"] += 1
            return False
        self._end(found)
        self.counters["released"] += 1
        self.renew(holder)
        return True

    # Queries

    @property
    def busy(self) -> int:
        """Slots that are neither FREE nor KEPT."""
        return sum(slot.state not in (SlotState.FREE, SlotState.KEPT) for slot in self._slots)

    def quarantined(self, reader: int) -> int:
        """Slots that are quarantined for this reader, alone or with others."""
        return sum(reader in slot.readers for slot in self._slots)

    def outstanding(self, holder: bytes) -> int:
        """The holder's requests that are queued, being filled or leased; 0 when it is not in."""
        state = self._holders.get(holder)
        return len(state.seqs) if state else 0

    def leases(self, holder: bytes) -> list[Lease]:
        """The holder's leases, oldest first, of slots that are being filled or are READY."""
        state = self._holders.get(holder)
        return list(state.leases.values()) if state else []

    def queued(self) -> int:
        """Requests that wait for a slot, of all holders."""
        return sum(len(state.queue) for state in self._holders.values())

    def counts(self) -> dict[str, int]:
        """How many slots are in each state: free, filling, ready, quarantined; and kept, if any is."""
        states = [slot.state for slot in self._slots]
        kept = SlotState.KEPT in states
        return {state.value: states.count(state) for state in SlotState if kept or state is not SlotState.KEPT}

    def sharing(self, holder: bytes) -> int:
        """How many other runs the holder's run shares with."""
        state = self._holders.get(holder)
        return len(self.shares.others(state.run)) if state is not None else 0

    def behind(self, holder: bytes) -> bool:
        """Whether the holder's run is so far behind its share that nobody waits for it."""
        state = self._holders.get(holder)
        return state is not None and state.run.behind

    # Transitions

    def _grant(self, name: bytes, schedule: Schedule) -> bool:
        """Give the holder's oldest request a lease if the guarantee allows it, and its share does not hold it."""
        holder = self._holders[name]
        if not holder.queue:
            return False
        ask, run = holder.queue[0], holder.run
        index = self.contents.find(ask)
        if holder.leases and self._pool_left() + (index is not None and self._orphaned(index)) < 1:
            return False
        source: Source
        if index is None:
            index = self.contents.fill(run, ask)
            if index is None:
                return False
            slot = self._slots[index]
            schedule.fills.append(Grant(index, slot.generation, ask.batch_id, name, ask.seq, slot.held, slot.cell))
            source = "forward" if slot.cell is None else "kept"
        else:
            source = self.contents.join(index, run)
            slot = self._slots[index]
        holder.queue.popleft()
        self._last_lease += 1
        lease = Lease(self._last_lease, name, ask.seq, index, slot.generation, ask.batch_id, slot.held, source)
        self._leases[lease.id] = holder.leases[lease.id] = lease
        slot.leases.add(lease.id)
        self.contents.leased(index, run)
        if ask.want is not None:
            self.shares.leased(run, ask.place)
        if slot.state is not SlotState.FILLING:
            schedule.ready.append(lease)
        return True

    def _pool_left(self) -> int:
        """pool − extras − orphans − Q; negative while orphans or Q sit in slots that were some holder's only one."""
        orphans = sum(self._orphaned(index) for index in range(self.num_slots))
        return self.pool - self._extras() - orphans - self.counts()["quarantined"]

    def _extras(self) -> int:
        return sum(max(len(holder.leases) - 1, 0) for holder in self._holders.values())

    def _orphaned(self, index: int) -> bool:
        slot = self._slots[index]
        return slot.state is SlotState.FILLING and not slot.leases

    def _filling(self, index: int, generation: int) -> Slot | None:
        """The slot the worker reports on, or None, counted, when the report is stale."""
        slot = self._slots[index] if 0 <= index < self.num_slots else None
        if slot is None or slot.state is not SlotState.FILLING or slot.generation != generation:
            self.counters["stale_fill"] += 1
            return None
        return slot

    def _end(self, lease: Lease) -> None:
        """End a lease. A READY slot is freed with its last lease, a FILLING one on the worker's report."""
        holder, slot = self._holders[lease.holder], self._slots[lease.slot]
        del self._leases[lease.id], holder.leases[lease.id]
        holder.seqs.remove(lease.seq)
        holder.borrowed.discard(lease.id)
        slot.leases.remove(lease.id)
        self.contents.settle(lease.slot)
