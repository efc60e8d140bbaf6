"""Random walks of a ring whose holders share forwards: what is kept, who is held, and that nobody else is."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from rings import A, B, C, Clock, content, fill_all
from specd.daemon.contents import UNLIKE
from specd.daemon.lag import LagWindow, Save
from specd.daemon.ring import Ring
from specd.daemon.slots import Grant, Lease, SlotState
from specd.protocol.capture import CaptureSpec, covers, union

NAMES = [bytes((97 + index,)) for index in range(5)]
SPECS = [CaptureSpec(taps=(1, 3)), CaptureSpec(taps=(3,), final=True), CaptureSpec(taps=(), final=True)]
LOW, FINAL = SPECS[0], SPECS[2]


class KeptWalk(RuleBasedStateMachine):
    names = st.sampled_from(NAMES)
    shares = st.sampled_from(["", "s", "s", "t"])
    runs_of = st.sampled_from([b"", b"", b"r"])

    @initialize(
        holders=st.integers(1, 4),
        pool=st.integers(0, 4),
        pace=st.sampled_from([0.0, 0.5, 3.0]),
        cells=st.integers(0, 5),
        always=st.sampled_from([None, CaptureSpec(taps=(3, 5))]),
        spare=st.integers(1, 9),
    )
    def start(self, holders: int, pool: int, pace: float, cells: int, always: CaptureSpec | None, spare: int) -> None:
        self.spare = spare
        self.clock = Clock()
        self.ring = Ring(holders + pool, holders, 1000.0, self.clock, pace, always)
        self.always = [] if always is None else [always]
        self.pace, self.cap = pace, max(1.0, 16 * pace) if pace else 0.0
        self.members: dict[bytes, tuple[str, bytes, CaptureSpec]] = {}
        self.allowance = 0.0
        self.credits: dict[bytes, int] = {}
        self.wants: dict[tuple[bytes, int], CaptureSpec] = {}
        self.live: dict[int, Lease] = {}
        self.filling: dict[int, int] = {}
        self.content: dict[tuple[int, int], tuple[bytes, CaptureSpec | None]] = {}
        self.told: deque[Save | Grant] = deque()
        """What the worker is to copy, in order."""
        self.begin_window(cells)
        self.place: dict[tuple[str, bytes], int] = {}
        self.seq = 0
        for index, name in enumerate(NAMES[:holders]):
            self.open(name, "s" if index < 3 else "", b"", SPECS[index % 3], -1)

    def begin_window(self, cells: int) -> None:
        """A worker with so many cells."""
        self.ring.contents.lag = LagWindow(cells)
        self.ring.contents.spare = self.spare
        self.cells: list[tuple[bytes, CaptureSpec | None] | None] = [None] * cells
        self.told.clear()

    def runs(self) -> set[tuple[str, bytes]]:
        return {(share, run or name) for name, (share, run, _) in self.members.items()}

    @rule(name=names, share=shares, run=runs_of, spec=st.sampled_from(SPECS), reader=st.integers(-1, 2))
    def open(self, name: bytes, share: str, run: bytes, spec: CaptureSpec, reader: int) -> None:
        self.forget(name)
        run = run if share else b""
        before = self.runs()
        granted = self.ring.open(name, 9, reader, spec=spec, share=share, run=run)
        if granted is not None:
            self.credits[name] = granted
            self.members[name] = (share, run, spec)
            self.allowance += self.cap * (self.runs() != before)

    @rule(name=names)
    def close(self, name: bytes) -> None:
        self.ring.close(name)
        self.forget(name)

    def forget(self, name: bytes) -> None:
        self.members.pop(name, None)
        self.live = {key: lease for key, lease in self.live.items() if lease.holder != name}

    @rule(reader=st.integers(0, 2), reset=st.integers(0, 9))
    def die(self, reader: int, reset: int) -> None:
        if reset < 9:
            self.ring.dead(reader)  # whose sessions may go on: no process is watched twice here
            return
        self.ring.reset()
        self.members.clear()
        self.live.clear()
        self.filling.clear()
        self.begin_window(len(self.cells))
        self.open(A, "s", b"", LOW, -1)
        self.open(B, "s", b"", FINAL, -1)

    @rule(data=st.data(), count=st.integers(1, 4), jump=st.integers(-3, 3))
    def submit(self, data: st.DataObject, count: int, jump: int) -> None:
        """A run goes on in its plan, now and then from elsewhere."""
        if not self.members:
            return
        self.ask(data.draw(st.sampled_from(sorted(self.members))), count, jump if abs(jump) == 3 else 0)

    def ask(self, name: bytes, count: int, jump: int) -> None:
        share, run, spec = self.members[name]
        place = max(0, self.place.get((share, run or name), 0) + jump)
        for _ in range(count):
            if self.ring.outstanding(name) >= self.credits[name]:
                break
            self.seq += 1
            self.wants[name, self.seq] = spec
            self.ring.submit(name, self.seq, content(place), spec, place=place)
            place += 1
        self.place[share, run or name] = place

    @rule()
    def schedule(self) -> None:
        ring, before = self.ring, {lease.id for name in self.members for lease in self.ring.leases(name)}
        orphans = any(slot.state is SlotState.FILLING and not slot.leases for slot in ring.contents.slots)
        idle = [name for name in self.members if ring.outstanding(name) and not ring.leases(name)]
        self.told.extend(ring.contents.saves())
        lag = [(copy.batch_id, copy.held) for copy in ring.contents.lag.copies if copy.saved]
        result = ring.schedule()
        for grant in result.fills:
            self.content[grant.slot, grant.generation] = grant.batch_id, grant.held
            if grant.cell is not None:
                self.told.append(grant)
                continue
            want = self.wants[grant.holder, grant.seq]
            kept = [held for batch_id, held in lag if batch_id == grant.batch_id and held is not None]
            assert not any(covers(held, want) for held in kept), "a forward is made for what the window has"
            share, _, spec = self.members[grant.holder]
            together = [other for s, _, other in self.members.values() if share and s == share]
            assert grant.held == union([spec, *together, *(self.always if share else [])])
            assert self.filling.get(grant.slot) is None
            self.filling[grant.slot] = grant.generation
        leases = {lease.id: lease for name in self.members for lease in ring.leases(name)}
        self.allowance += self.pace * sum(
            key not in before and self.members[lease.holder][0] != "" for key, lease in leases.items()
        )
        for lease in leases.values():
            slot = ring.contents.slots[lease.slot]
            assert slot.generation == lease.generation
            assert slot.batch_id == lease.batch_id
            assert slot.held == lease.held
            assert covers(lease.held, self.wants[lease.holder, lease.seq]), "S4"
        self.live.update({lease.id: lease for lease in result.ready})
        unserved = [name for name in idle if not ring.leases(name)]
        if orphans:
            return
        assert all(self.members[name][0] for name in unserved), "S2: an outsider waits for a share"
        assert not unserved or ring.shares.dues(), "S1: a holder without a lease waits and is not held"
        assert ring.counts()["free"] + ring.counts().get("kept", 0) >= len(unserved), "S1: no room for it"

    @rule()
    def wait_out(self) -> None:
        """When nobody is held any longer, every holder has a lease."""
        self.schedule()
        if dues := self.ring.shares.dues():
            self.clock.now = max(dues) + 1e-6
            self.schedule()
            orphans = any(slot.state is SlotState.FILLING and not slot.leases for slot in self.ring.contents.slots)
            waiting = [n for n in self.members if self.ring.outstanding(n) and not self.ring.leases(n)]
            assert orphans or not waiting or self.ring.shares.dues(), "S1"

    @rule(count=st.integers(1, 4))
    def copy(self, count: int) -> None:
        """The worker copies slots to cells, and cells to slots."""
        for _ in range(min(count, len(self.told))):
            told = self.told.popleft()
            slot = self.ring.contents.slots[told.slot]
            if isinstance(told, Save):
                ok = slot.generation == told.generation and slot.state is not SlotState.FILLING
                self.cells[told.cell] = self.content[told.slot, told.generation] if ok else None
                self.ring.contents.lag.saved(told.number, ok)
            else:
                assert told.cell is not None
                assert self.cells[told.cell] == (told.batch_id, told.held), "another batch is in that cell"
                leases = self.ring.filled(told.slot, told.generation, None)
                self.live.update({lease.id: lease for lease in leases})

    @rule(data=st.data(), ok=st.integers(0, 4))
    def report(self, data: st.DataObject, ok: int) -> None:
        if not self.filling:
            return
        slot = data.draw(st.sampled_from(sorted(self.filling)))
        generation = self.filling.pop(slot)
        if ok:
            self.live.update({lease.id: lease for lease in self.ring.filled(slot, generation, 0.5)})
        else:
            self.ring.failed(slot, generation)

    @rule()
    def work(self) -> None:
        self.schedule()
        self.copy(len(self.told))
        for slot, generation in sorted(self.filling.items()):
            self.live.update({lease.id: lease for lease in self.ring.filled(slot, generation, 0.5)})
        self.filling.clear()

    @rule(data=st.data(), borrow=st.integers(0, 4), count=st.integers(1, 3))
    def release(self, data: st.DataObject, borrow: int, count: int) -> None:
        for _ in range(min(count, len(self.live))):
            lease = self.live[data.draw(st.sampled_from(sorted(self.live)))]
            if borrow == 0:
                if lease.holder in self.members and self.ring._holders[lease.holder].reader >= 0:
                    self.ring.borrow(lease.holder, lease.id)
                continue
            del self.live[lease.id]
            assert self.ring.release(lease.holder, lease.id)

    @rule(name=names, count=st.integers(1, 5), jump=st.sampled_from([0, 0, 0, -3]), patient=st.booleans())
    def train(self, name: bytes, count: int, jump: int, patient: bool) -> None:
        """A trainer reads its next batches one by one."""
        for _ in range(count if name in self.members else 0):
            self.ask(name, 1, jump)
            jump = 0
            if patient:
                self.wait_out()
            self.work()
            for lease in [lease for lease in self.live.values() if lease.holder == name]:
                del self.live[lease.id]
                assert self.ring.release(name, lease.id)

    @rule(seconds=st.floats(0, 5))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def slots_add_up(self) -> None:
        ring, runs = self.ring, self.runs()
        counts = ring.counts()
        assert sum(counts.values()) == ring.num_slots
        assert counts["filling"] == len(self.filling) + sum(isinstance(each, Grant) for each in self.told)
        assert ring.busy == ring.num_slots - counts["free"] - counts.get("kept", 0)
        extras = sum(max(len(ring.leases(name)) - 1, 0) for name in self.members)
        assert len(self.members) + extras + counts["quarantined"] <= ring.num_slots, "the guarantee"
        for slot in ring.contents.slots:
            assert {(run.share, run.name) for run in slot.owed} <= runs, "a run that ended is owed a slot"
            if slot.state is SlotState.KEPT:
                assert slot.owed
                assert not slot.leases
                assert not slot.readers, "quarantine wins over what is kept"
            if slot.state is SlotState.FREE:
                assert not slot.leases | slot.owed | slot.readers
            if slot.state is SlotState.READY:
                assert slot.leases

    @invariant()
    def the_window_adds_up(self) -> None:
        lag = self.ring.contents.lag
        cells = [copy.cell for copy in lag.copies]
        assert len(set(cells)) == len(cells) == lag.used <= lag.cells
        for copy in lag.copies:
            assert copy.owed
            assert {(run.share, run.name) for run in copy.owed} <= self.runs(), "a run that ended is owed a cell"

    @invariant()
    def nobody_is_held_too_long(self) -> None:
        assert self.ring.counters["held_ms"] <= 1000 * self.allowance + 1 + self.ring.counters["submitted"], "S3"


def test_random_walks() -> None:
    slow = settings(
        max_examples=60, stateful_step_count=80, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    run_state_machine_as_test(KeptWalk, settings=slow)


def sharing(num_slots: int = 5, pace_s: float = 1.0) -> tuple[Ring, Clock]:
    clock = Clock()
    ring = Ring(num_slots, 3, 1000.0, clock, pace_s)
    for name, share in ((A, "s"), (B, "s"), (C, "")):
        ring.open(name, num_slots, spec=LOW if name == A else FINAL, share=share)
    return ring, clock


def read(ring: Ring, holder: bytes, *places: int) -> None:
    """Submit these batches, have them filled, and release them."""
    for place in places:
        ring.submit(holder, 1000 + place, content(place), LOW if holder == A else FINAL, place=place)
        for lease in fill_all(ring):
            assert ring.release(holder, lease.id)


def test_a_slot_is_kept_for_the_other_member_and_free_once_it_was_read() -> None:
    ring, _ = sharing()
    read(ring, A, 0, 1)
    assert ring.counts()["kept"] == 2
    read(ring, B, 0, 1)
    assert "kept" not in ring.counts()
    assert (ring.counters["fills"], ring.counters["kept_hits"]) == (2, 2)


def test_runs_whose_batches_differ_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    ring, _ = sharing(pace_s=0.0)
    read(ring, A, 0, 1)
    read(ring, B, 0, 1)
    assert ring.counters["unlike"] == 0
    for place in range(2, 2 + 2 * UNLIKE):
        read(ring, A, place)
        ring.submit(B, 2000 + place, content(1000 + place), FINAL, place=place)
        for lease in fill_all(ring):
            ring.release(B, lease.id)
    assert ring.counters["unlike"] >= UNLIKE
    assert caplog.text.count("share s: its runs have other batches at the same place") == 1


def test_what_is_kept_for_a_member_goes_with_it() -> None:
    ring, _ = sharing()
    read(ring, A, 0, 1)
    ring.close(B)
    assert ring.counts()["free"] == 5


def test_a_stranger_takes_kept_slots_at_once() -> None:
    ring, _ = sharing(num_slots=3)
    read(ring, A, 0, 1, 2)
    assert ring.counts()["kept"] == 3
    read(ring, C, 7)
    assert ring.counters["held_ms"] == 0
    assert not ring.behind(B)
    assert ring.counts()["kept"] == 2


def test_a_member_waits_for_the_other_as_long_as_its_credit_lasts_and_then_leaves_it_behind() -> None:
    ring, clock = sharing(num_slots=3)
    read(ring, A, 0, 1, 2)
    ring.submit(A, 1, content(3), LOW, place=3)
    assert ring.schedule().fills == []
    (due,) = ring.shares.dues()
    assert due == ring.next_deadline() == pytest.approx(clock.now + 16.0)
    clock.now = due
    (grant,) = ring.schedule().fills
    assert ring.counters["held_ms"] == 16_000
    assert ring.behind(B)
    assert [slot.batch_id for slot in ring.contents.slots if slot.state is SlotState.KEPT] == [content(0), content(1)]
    for lease in ring.filled(grant.slot, grant.generation):
        ring.release(A, lease.id)
    ring.submit(A, 2, content(4), LOW, place=4)
    assert len(ring.schedule().fills) == 1, "nobody waits for who is behind"
    read(ring, B, 0)
    assert not ring.behind(B), "it has met the share again"


def test_who_is_ahead_waits_while_the_other_has_a_fill_of_its_own_made() -> None:
    ring, _ = sharing()
    ring.submit(B, 1, content(0), FINAL, place=0)
    (behind,) = ring.schedule().fills
    ring.submit(A, 1, content(5), LOW, place=5)
    assert ring.schedule().fills == []
    ring.filled(behind.slot, behind.generation)
    assert len(ring.schedule().fills) == 1


def test_who_was_past_a_batch_is_not_owed_it() -> None:
    ring, _ = sharing(pace_s=0.0)
    read(ring, A, 8, 9)
    ring.close(B)
    ring.open(B, 5, spec=FINAL, share="s")
    read(ring, B, 0, 1)
    assert ring.counts()["free"] == 5


def test_a_forward_captures_what_all_members_want_when_it_is_granted() -> None:
    ring, _ = sharing()
    ring.submit(A, 1, content(0), LOW)
    (grant,) = ring.schedule().fills
    assert grant.held == CaptureSpec(taps=(1, 3), final=True)
    ring.submit(C, 1, content(0), CaptureSpec(taps=(3,)))
    ring.submit(C, 2, content(0), CaptureSpec(taps=(2,)))
    assert [fill.held for fill in ring.schedule().fills] == [CaptureSpec(taps=(2,))], "it joins what covers its own"


def test_who_cannot_cut_joins_only_what_is_equal() -> None:
    ring, _ = sharing()
    ring.submit(A, 1, content(0), LOW)
    ring.submit(C, 1, content(0), LOW, cuts=False)
    ring.submit(C, 2, content(0), LOW, cuts=False)
    assert [fill.held for fill in ring.schedule().fills] == [CaptureSpec(taps=(1, 3), final=True), LOW]
