"""A random walk of the ring against a model that knows only the requests and the ring's answers."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from rings import Clock, content
from specd.daemon.ring import Ring
from specd.daemon.slots import Lease
from specd.errors import ProtocolError


class Request:
    """What the model knows of one request: queued until granted, then on (slot, generation), announced, borrowed."""

    def __init__(self, seq: int, batch_id: bytes) -> None:
        self.seq = seq
        self.batch_id = batch_id
        self.place: tuple[int, int] | None = None
        self.lease: Lease | None = None
        self.borrowed = False


NAMES = [bytes((97 + index,)) for index in range(5)]


class RingWalk(RuleBasedStateMachine):
    tickets = Bundle("tickets")  # every lease id that was ever announced, with its holder

    names = st.sampled_from(NAMES)
    contents = st.integers(0, 7).map(content)
    readers = st.integers(-1, 3)

    @initialize(holders=st.integers(1, 4), pool=st.integers(0, 4), ttl_s=st.integers(1, 20))
    def start(self, holders: int, pool: int, ttl_s: int) -> None:
        self.clock = Clock()
        self.ttl_s = ttl_s
        self.max_holders, self.pool, self.num_slots = holders, pool, holders + pool
        self.ring = Ring(self.num_slots, holders, float(ttl_s), self.clock)
        self.requests: dict[bytes, list[Request]] = {}  # of open holders, in order of submission
        self.credits: dict[bytes, int] = {}
        self.deadlines: dict[bytes, float] = {}
        self.readers_of: dict[bytes, int] = {}
        self.quarantine: dict[tuple[int, int], set[int]] = {}  # (slot, generation) → readers that may still read it
        self.contents_of: dict[tuple[int, int], bytes] = {}  # every (slot, generation) ever assigned
        self.filling: dict[int, int] = {}  # slot → generation the worker owes a report for
        self.generations = [0] * self.num_slots
        self.announced: set[int] = set()
        self.seq = 0
        self.stale = {"stale_release": 0, "stale_fill": 0, "expired": 0, "joins": 0}
        for index, name in enumerate(NAMES[:holders]):
            self.open(name, 1 + pool, index - 1)

    # what the model derives

    def held(self, holder: bytes) -> list[Request]:
        return [request for request in self.requests[holder] if request.place is not None]

    def on(self, place: tuple[int, int]) -> list[tuple[bytes, Request]]:
        return [(h, r) for h, requests in self.requests.items() for r in requests if r.place == place]

    def orphans(self) -> int:
        return sum(not self.on(place) for place in self.filling.items())

    def extras(self) -> int:
        return sum(max(len(self.held(holder)) - 1, 0) for holder in self.requests)

    def pool_left(self) -> int:
        return self.pool - self.extras() - self.orphans() - len(self.quarantine)

    def forget(self, holder: bytes) -> None:
        """The holder ended: what it borrows may still be read by its process."""
        for request in self.requests.pop(holder, []):
            if request.borrowed:
                assert request.place is not None
                self.quarantine.setdefault(request.place, set()).add(self.readers_of[holder])
        self.credits.pop(holder, None)
        self.deadlines.pop(holder, None)

    def announce(self, lease: Lease) -> None:
        """A lease the ring wants announced must answer exactly one granted, silent request."""
        (request,) = [r for r in self.requests[lease.holder] if r.seq == lease.seq]
        assert request.lease is None
        assert lease.id not in self.announced
        assert request.place == (lease.slot, lease.generation)
        assert lease.batch_id == request.batch_id == self.contents_of[lease.slot, lease.generation]
        self.announced.add(lease.id)
        request.lease = lease

    # rules

    @rule(holder=names, credits=st.integers(-1, 9), reader=readers)
    def open(self, holder: bytes, credits: int, reader: int) -> None:
        self.forget(holder)
        granted = self.ring.open(holder, credits, reader)
        most = 1 + self.pool - sum(reader in readers for readers in self.quarantine.values())
        room = self.num_slots - len(self.requests) - self.extras() - len(self.quarantine)
        if len(self.requests) == self.max_holders or room < 1 or most < 1:
            assert granted is None
            return
        assert granted is not None
        assert granted == max(1, min(credits, most))
        self.requests[holder], self.credits[holder], self.readers_of[holder] = [], granted, reader
        self.deadlines[holder] = self.clock.now + self.ttl_s

    @rule(holder=names, reader=st.integers(0, 3), how=st.sampled_from(["close"] * 5 + ["die"] * 4 + ["reset"]))
    def end(self, holder: bytes, reader: int, how: str) -> None:
        if how == "die":
            self.die(reader)
        elif how == "reset":
            self.reset()
        else:
            self.ring.close(holder)
            self.forget(holder)

    def die(self, reader: int) -> None:
        """A process ends, and with it all its sessions."""
        for holder in [holder for holder in self.requests if self.readers_of[holder] == reader]:
            self.ring.close(holder)
            self.forget(holder)
        self.ring.dead(reader)
        for place, readers in list(self.quarantine.items()):
            readers.discard(reader)
            if not readers:
                del self.quarantine[place]

    @rule(data=st.data(), batches=st.lists(contents, min_size=2, max_size=5), repeat=st.integers(0, 9))
    def submit(self, data: st.DataObject, batches: list[bytes], repeat: int) -> None:
        holder = data.draw(st.sampled_from(sorted(self.requests) or NAMES), label="holder")
        for batch_id in batches:
            self.ask(holder, batch_id, repeat == 0)

    def ask(self, holder: bytes, batch_id: bytes, repeat: bool) -> None:
        mine = self.requests.get(holder)
        seq = mine[0].seq if mine and repeat else self.seq
        if mine is None or len(mine) >= self.credits[holder] or any(request.seq == seq for request in mine):
            with pytest.raises(ProtocolError):
                self.ring.submit(holder, seq, batch_id)
            return
        self.ring.submit(holder, seq, batch_id)
        mine.append(Request(seq, batch_id))
        self.deadlines[holder] = self.clock.now + self.ttl_s
        self.seq += 1

    @rule(target=tickets, holder=names, reader=st.integers(0, 3), batches=st.lists(contents, min_size=1, max_size=3))
    def vanish(self, holder: bytes, reader: int, batches: list[bytes]) -> list[tuple[bytes, int]]:
        """A session begins, borrows all it can get, and ends without a release."""
        self.open(holder, len(batches), reader)
        for batch_id in batches:
            self.ask(holder, batch_id, repeat=False)
        served = self.fill_all()
        for request in [r for r in self.requests.get(holder, []) if r.lease is not None]:
            self.take(holder, request)
        self.ring.close(holder)
        self.forget(holder)
        return served

    @rule()
    def schedule(self) -> None:
        orphans_before = self.orphans()
        waiting = [h for h, requests in self.requests.items() if requests and not self.held(h)]
        queues = {h: [r for r in requests if r.place is None] for h, requests in self.requests.items()}
        result = self.ring.schedule()
        for fill in result.fills:
            assert fill.slot not in self.filling
            assert fill.slot not in {slot for slot, _ in self.quarantine}, "refilled while it may be read in place"
            assert not any(r.place and r.place[0] == fill.slot for rs in self.requests.values() for r in rs)
            assert fill.generation == self.generations[fill.slot] + 1
            assert fill.batch_id not in {self.contents_of[place] for place in self.places()}
            assert (fill.seq, fill.batch_id) in {(r.seq, r.batch_id) for r in queues[fill.holder]}
            self.generations[fill.slot] = fill.generation
            self.filling[fill.slot] = fill.generation
            self.contents_of[fill.slot, fill.generation] = fill.batch_id
        placed = 0
        for holder in self.requests:
            leases = {lease.seq: lease for lease in self.ring.leases(holder)}
            for request in self.requests[holder]:
                lease = leases.get(request.seq)
                if request.place is None and lease is not None:
                    assert self.contents_of[lease.slot, lease.generation] == request.batch_id
                    assert self.generations[lease.slot] == lease.generation
                    request.place = (lease.slot, lease.generation)
                    placed += 1
            still = [r for r in queues[holder] if r.place is None]
            assert still == queues[holder][len(queues[holder]) - len(still) :], "first in, first out"
        self.stale["joins"] += placed - len(result.fills)
        for lease in result.ready:
            assert lease.slot not in self.filling
            self.announce(lease)
        for fill in result.fills:
            assert self.on((fill.slot, fill.generation)), "a fill without a request"
        # No starvation: a holder that had no lease and a request has one now, or waits only for the worker's report.
        served = [holder for holder in waiting if self.held(holder)]
        if orphans_before == 0:
            assert served == waiting
        elif len(served) < len(waiting):
            assert self.ring.counts()["free"] == 0
        # Nothing is held back: a request that still waits is blocked by the guarantee or by a full ring.
        resident = {self.contents_of[place] for place in self.places()}
        spare = self.pool_left()
        for holder, requests in self.requests.items():
            heads = [r for r in requests if r.place is None][:1]
            if heads and heads[0].batch_id not in resident:
                assert self.ring.counts()["free"] == 0 or (self.held(holder) and spare < 1)
            elif heads:
                (place,) = [p for p in self.places() if self.contents_of[p] == heads[0].batch_id]
                adopts = place in self.filling.items() and not self.on(
                    place
                )  # joining an orphan moves its charge, it adds none
                assert self.held(holder)
                assert spare + adopts < 1

    def places(self) -> set[tuple[int, int]]:
        """All (slot, generation) in use: being filled, leased, or quarantined."""
        leased = (r.place for rs in self.requests.values() for r in rs if r.place)
        return {*self.filling.items(), *leased, *self.quarantine}

    @rule(target=tickets, data=st.data(), ok=st.booleans(), stale=st.integers(0, 9))
    def report(self, data: st.DataObject, ok: bool, stale: int) -> list[tuple[bytes, int]]:
        if stale == 0 or not self.filling:
            slot = data.draw(st.integers(-1, self.num_slots), label="slot")
            generation = data.draw(st.integers(0, 5), label="generation")
            if self.filling.get(slot) == generation:
                return []
            assert (self.ring.filled if ok else self.ring.failed)(slot, generation) == []
            self.stale["stale_fill"] += 1
            return []
        return self.answer(data.draw(st.sampled_from(sorted(self.filling)), label="slot"), ok)

    def answer(self, slot: int, ok: bool) -> list[tuple[bytes, int]]:
        """The worker reports on a slot it is filling; returns the leases that were announced or failed."""
        place = (slot, self.filling.pop(slot))
        expected = sorted((holder, request.seq) for holder, request in self.on(place))
        leases = (self.ring.filled if ok else self.ring.failed)(*place)
        assert sorted((lease.holder, lease.seq) for lease in leases) == expected
        assert [lease.id for lease in leases] == sorted(lease.id for lease in leases)
        for lease in leases:
            if ok:
                self.announce(lease)
            else:
                mine = self.requests[lease.holder]
                mine[:] = [request for request in mine if request.seq != lease.seq]
        return [(lease.holder, lease.id) for lease in leases]

    @rule(target=tickets)
    def work(self) -> list[tuple[bytes, int]]:
        """The worker fills everything that is scheduled."""
        return self.fill_all()

    def fill_all(self) -> list[tuple[bytes, int]]:
        self.schedule()
        return [ticket for slot in sorted(self.filling) for ticket in self.answer(slot, ok=True)]

    @rule(holder=names, batch=tickets, foreign=st.booleans(), data=st.data())
    def release(self, holder: bytes, batch: list[tuple[bytes, int]], foreign: bool, data: st.DataObject) -> None:
        if not batch:
            return
        owner, lease = data.draw(st.sampled_from(batch), label="ticket")
        who = holder if foreign else owner
        live = [r for r in self.requests.get(who, []) if r.lease is not None and r.lease.id == lease]
        assert self.ring.lease(who, lease) == (live[0].lease if live else None)
        assert self.ring.release(who, lease) == bool(live)
        if live:
            self.requests[who].remove(live[0])
            self.deadlines[who] = self.clock.now + self.ttl_s
        else:
            self.stale["stale_release"] += 1

    @rule(data=st.data())
    def borrow(self, data: st.DataObject) -> None:
        live = [(h, r) for h, requests in self.requests.items() for r in requests if r.lease is not None]
        if not live:
            return
        self.take(*data.draw(st.sampled_from(live), label="lease"))

    def take(self, holder: bytes, request: Request) -> None:
        """Borrow a live lease."""
        assert request.lease is not None
        if self.readers_of[holder] < 0:
            with pytest.raises(ProtocolError):
                self.ring.borrow(holder, request.lease.id)
            return
        self.ring.borrow(holder, request.lease.id)
        request.borrowed = True
        self.deadlines[holder] = self.clock.now + self.ttl_s

    @rule(holder=names, batch=tickets)
    def borrow_of_another(self, holder: bytes, batch: list[tuple[bytes, int]]) -> None:
        """Only a lease of one's own that is not over can be borrowed."""
        for _, lease in batch:
            if all(r.lease is None or r.lease.id != lease for r in self.requests.get(holder, [])):
                with pytest.raises(ProtocolError):
                    self.ring.borrow(holder, lease)

    @rule(holder=names)
    def touch_unannounced(self, holder: bytes) -> None:
        """A lease that was never announced cannot be guessed, to be borrowed or ended."""
        for lease in self.ring.leases(holder):
            if lease.id not in self.announced:
                with pytest.raises(ProtocolError):
                    self.ring.borrow(holder, lease.id)
                assert not self.ring.release(holder, lease.id)
                self.stale["stale_release"] += 1

    @rule(holder=names)
    def renew(self, holder: bytes) -> None:
        assert self.ring.renew(holder) == (holder in self.requests)
        if holder in self.requests:
            self.deadlines[holder] = self.clock.now + self.ttl_s

    @rule(seconds=st.integers(1, 8))
    def wait(self, seconds: int) -> None:
        self.clock.now += seconds

    @rule()
    def expire(self) -> None:
        late = {holder for holder, deadline in self.deadlines.items() if deadline <= self.clock.now}
        expired = self.ring.expire()
        assert len(expired) == len(late)
        assert set(expired) == late
        for holder in late:
            self.forget(holder)
        self.stale["expired"] += len(late)

    def reset(self) -> None:
        """The worker dies."""
        self.ring.reset()
        for holder in list(self.requests):
            self.forget(holder)
        self.filling.clear()
        self.quarantine.clear()

    # invariants

    @invariant()
    def agrees(self) -> None:
        ring = self.ring
        assert f"; {len(self.requests)} holders, " in repr(ring)
        for reader in range(4):
            assert ring.quarantined(reader) == sum(reader in readers for readers in self.quarantine.values())
        assert ring.next_deadline() == min(self.deadlines.values(), default=None)
        for holder, requests in self.requests.items():
            assert ring.outstanding(holder) == len(requests) <= self.credits[holder]
            assert sorted(lease.seq for lease in ring.leases(holder)) == sorted(r.seq for r in self.held(holder))
        assert ring.queued() == sum(r.place is None for rs in self.requests.values() for r in rs)
        for name, count in self.stale.items():
            assert ring.counters[name] == count, name

    @invariant()
    def no_slot_is_lost_or_shared(self) -> None:
        places = self.places()
        slots = [slot for slot, _ in places]
        assert len(slots) == len(set(slots)), "two generations of a slot in use at once"
        assert len({self.contents_of[place] for place in places}) == len(places), "the same content twice"
        filling, quarantined = len(self.filling), len(self.quarantine)
        ready = len(places) - filling - quarantined
        counts = {"free": self.num_slots - len(places), "filling": filling, "ready": ready, "quarantined": quarantined}
        assert self.ring.counts() == counts
        assert self.ring.busy == len(places)

    @invariant()
    def bounds_hold(self) -> None:
        assert len(self.requests) <= self.max_holders
        assert self.extras() <= self.pool
        assert len(self.requests) + self.extras() + len(self.quarantine) <= self.num_slots
        assert all(len(self.held(holder)) <= 1 + self.pool for holder in self.requests)

    def teardown(self) -> None:
        """The worker's reports and the end of all holders and processes free every slot."""
        if not hasattr(self, "ring"):
            return
        for slot, generation in list(self.filling.items()):
            self.ring.filled(slot, generation)
        for holder in list(self.requests):
            self.ring.close(holder)
            self.forget(holder)
        free = self.num_slots - len(self.quarantine)
        assert self.ring.counts() == {"free": free, "filling": 0, "ready": 0, "quarantined": len(self.quarantine)}
        for reader in range(4):
            self.ring.dead(reader)
        assert self.ring.counts()["free"] == self.num_slots


def test_random_walk_agrees_with_the_model() -> None:
    walk = settings(
        max_examples=50,
        stateful_step_count=120,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    run_state_machine_as_test(RingWalk, settings=walk)
