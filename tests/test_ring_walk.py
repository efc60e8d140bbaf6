"""A random walk of the ring beside a model that knows only requests and what the ring told the outside world."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from rings import Clock, content
from specd.errors import ProtocolError
from specd.ring import Lease, Ring


class Request:
    """What the model knows of one request: queued until granted, then on (slot, generation), then announced."""

    def __init__(self, seq: int, batch_id: bytes) -> None:
        self.seq = seq
        self.batch_id = batch_id
        self.place: tuple[int, int] | None = None
        self.lease: Lease | None = None


class RingWalk(RuleBasedStateMachine):
    tickets = Bundle("tickets")  # every lease id that was ever announced, with its holder

    names = st.sampled_from([bytes((97 + index,)) for index in range(5)])
    contents = st.integers(0, 7).map(content)

    @initialize(holders=st.integers(1, 4), pool=st.integers(0, 4), ttl_s=st.integers(1, 20))
    def start(self, holders: int, pool: int, ttl_s: int) -> None:
        self.clock = Clock()
        self.ttl_s = ttl_s
        self.max_holders, self.pool, self.num_slots = holders, pool, holders + pool
        self.ring = Ring(self.num_slots, holders, float(ttl_s), self.clock)
        self.requests: dict[bytes, list[Request]] = {}  # of open holders, in order of submission
        self.credits: dict[bytes, int] = {}
        self.deadlines: dict[bytes, float] = {}
        self.contents_of: dict[tuple[int, int], bytes] = {}  # every (slot, generation) ever assigned
        self.filling: dict[int, int] = {}  # slot → generation the worker owes a report for
        self.generations = [0] * self.num_slots
        self.announced: set[int] = set()
        self.seq = 0
        self.stale = {"stale_release": 0, "stale_fill": 0, "expired": 0, "joins": 0}

    # what the model derives

    def held(self, holder: bytes) -> list[Request]:
        return [request for request in self.requests[holder] if request.place is not None]

    def on(self, place: tuple[int, int]) -> list[tuple[bytes, Request]]:
        return [(h, r) for h, requests in self.requests.items() for r in requests if r.place == place]

    def orphans(self) -> int:
        return sum(not self.on(place) for place in self.filling.items())

    def extras(self) -> int:
        return sum(max(len(self.held(holder)) - 1, 0) for holder in self.requests)

    def forget(self, holder: bytes) -> None:
        self.requests.pop(holder, None)
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

    @rule(holder=names, credits=st.integers(-1, 9))
    def open(self, holder: bytes, credits: int) -> None:
        self.forget(holder)
        granted = self.ring.open(holder, credits)
        if len(self.requests) == self.max_holders:
            assert granted is None
            return
        assert granted is not None
        assert granted == max(1, min(credits, 1 + self.pool))
        self.requests[holder], self.credits[holder] = [], granted
        self.deadlines[holder] = self.clock.now + self.ttl_s

    @rule(holder=names)
    def close(self, holder: bytes) -> None:
        self.ring.close(holder)
        self.forget(holder)

    @rule(holder=names, batch_id=contents, repeat=st.booleans())
    def submit(self, holder: bytes, batch_id: bytes, repeat: bool) -> None:
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

    @rule()
    def schedule(self) -> None:
        orphans_before = self.orphans()
        waiting = [h for h, requests in self.requests.items() if requests and not self.held(h)]
        queues = {h: [r for r in requests if r.place is None] for h, requests in self.requests.items()}
        result = self.ring.schedule()
        for fill in result.fills:
            assert fill.slot not in self.filling
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
            assert self.on((fill.slot, fill.generation)), "a fill that nobody asked for"
        # No starvation: who had nothing and asked has something now, or only the worker's answer is missing.
        served = [holder for holder in waiting if self.held(holder)]
        if orphans_before == 0:
            assert served == waiting
        elif len(served) < len(waiting):
            assert self.ring.counts()["free"] == 0
        # Nothing is held back: whoever still waits is blocked by the guarantee or by a full ring.
        resident = {self.contents_of[place] for place in self.places()}
        spare = self.pool - self.extras() - self.orphans()
        for holder, requests in self.requests.items():
            heads = [r for r in requests if r.place is None][:1]
            if heads and heads[0].batch_id not in resident:
                assert self.ring.counts()["free"] == 0 or (self.held(holder) and spare < 1)
            elif heads:
                (place,) = [p for p in self.places() if self.contents_of[p] == heads[0].batch_id]
                adopts = not self.on(place)  # joining an orphan moves its charge, it adds none
                assert self.held(holder)
                assert spare + adopts < 1

    def places(self) -> set[tuple[int, int]]:
        """All (slot, generation) in use: being filled, or leased."""
        return {*self.filling.items(), *(r.place for rs in self.requests.values() for r in rs if r.place)}

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
        slot = data.draw(st.sampled_from(sorted(self.filling)), label="slot")
        place = (slot, self.filling[slot])
        assert self.ring.wanted(*place) == bool(self.on(place))
        expected = sorted((holder, request.seq) for holder, request in self.on(place))
        leases = (self.ring.filled if ok else self.ring.failed)(*place)
        del self.filling[slot]
        assert sorted((lease.holder, lease.seq) for lease in leases) == expected
        assert [lease.id for lease in leases] == sorted(lease.id for lease in leases)
        for lease in leases:
            if ok:
                self.announce(lease)
            else:
                mine = self.requests[lease.holder]
                mine[:] = [request for request in mine if request.seq != lease.seq]
        return [(lease.holder, lease.id) for lease in leases]

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

    @rule(holder=names)
    def release_unannounced(self, holder: bytes) -> None:
        """A lease that was never announced cannot be guessed and ended."""
        for lease in self.ring.leases(holder):
            if lease.id not in self.announced:
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

    @rule(sure=st.integers(0, 4))
    def reset(self, sure: int) -> None:
        if sure:
            return
        assert sorted(self.ring.reset()) == sorted(self.requests)
        for holder in list(self.requests):
            self.forget(holder)
        self.filling.clear()

    # invariants

    @invariant()
    def agrees(self) -> None:
        ring = self.ring
        assert sorted(ring.holders) == sorted(self.requests)
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
        filling = len(self.filling)
        counts = {"free": self.num_slots - len(places), "filling": filling, "ready": len(places) - filling}
        assert self.ring.counts() == counts
        assert self.ring.busy == len(places)

    @invariant()
    def bounds_hold(self) -> None:
        assert len(self.requests) <= self.max_holders
        assert self.extras() <= self.pool
        assert all(len(self.held(holder)) <= 1 + self.pool for holder in self.requests)

    def teardown(self) -> None:
        """Whatever happened, the worker's answers and the holders' end give every slot back."""
        if not hasattr(self, "ring"):
            return
        for slot, generation in list(self.filling.items()):
            self.ring.filled(slot, generation)
        for holder in list(self.requests):
            self.ring.close(holder)
        assert self.ring.counts() == {"free": self.num_slots, "filling": 0, "ready": 0}


def test_random_walk_agrees_with_the_model() -> None:
    walk = settings(
        max_examples=120,
        stateful_step_count=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    run_state_machine_as_test(RingWalk, settings=walk)
