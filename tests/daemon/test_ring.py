"""The ring: holders, requests, leases, deadlines."""

from __future__ import annotations

import pytest

from rings import A, B, C, content, fill_all, make
from specd.daemon.slots import Grant, Lease
from specd.errors import ConfigError, ProtocolError


@pytest.mark.parametrize(("slots", "holders"), [(0, 1), (0, 0), (3, 4), (4, 0), (-1, -1)])
def test_refuses_a_ring_without_a_slot_for_every_holder(slots: int, holders: int) -> None:
    with pytest.raises(ConfigError, match=r"ring\.max_sessions"):
        make(slots, holders)


def test_refuses_a_lease_ttl_of_zero() -> None:
    with pytest.raises(ConfigError, match="lease_ttl_s"):
        make(ttl_s=0.0)


@pytest.mark.parametrize(("asked", "granted"), [(-5, 1), (0, 1), (1, 1), (3, 3), (4, 3), (1 << 40, 3)])
def test_credits_are_granted_up_to_the_cap(asked: int, granted: int) -> None:
    ring, _ = make(num_slots=4, max_holders=2)  # pool of 2: at most 3 for one holder
    assert ring.open(A, asked) == granted


def test_no_more_holders_than_max() -> None:
    ring, _ = make(max_holders=2)
    assert [ring.open(A, 1), ring.open(B, 1)] == [1, 1]
    assert ring.open(C, 1) is None
    ring.close(A)
    assert ring.open(C, 1) == 1
    assert "2 holders" in repr(ring)


def test_one_batch_from_submit_to_release() -> None:
    ring, _ = make()
    ring.open(A, 2)
    ring.submit(A, 7, content(1))
    assert (ring.queued(), ring.outstanding(A), ring.busy) == (1, 1, 0)
    schedule = ring.schedule()
    assert schedule == ([Grant(0, 1, content(1), A, 7)], [])
    assert ring.counts() == {"free": 3, "filling": 1, "ready": 0, "quarantined": 0}
    (lease,) = ring.filled(0, 1)
    assert lease == Lease(1, A, 7, 0, 1, content(1))
    assert ring.lease(A, lease.id) == lease
    assert ring.leases(A) == [lease]
    assert ring.release(A, lease.id)
    assert ring.counts() == {"free": 4, "filling": 0, "ready": 0, "quarantined": 0}
    assert (ring.outstanding(A), ring.lease(A, lease.id)) == (0, None)


def test_generation_of_a_slot_goes_up_each_time_it_is_assigned() -> None:
    ring, _ = make(num_slots=1, max_holders=1)
    ring.open(A, 1)
    for number in range(1, 5):
        ring.submit(A, number, content(number))
        (lease,) = fill_all(ring)
        assert (lease.slot, lease.generation) == (0, number)
        ring.release(A, lease.id)


def test_free_slots_are_taken_oldest_first() -> None:
    ring, _ = make(num_slots=3, max_holders=1)
    ring.open(A, 3)
    slots = []
    for number in range(6):
        ring.submit(A, number, content(number))
        (lease,) = fill_all(ring)
        slots.append(lease.slot)
        ring.release(A, lease.id)
    assert slots == [0, 1, 2, 0, 1, 2]


def test_submit_is_refused_without_session_credit_or_fresh_seq() -> None:
    ring, _ = make()
    with pytest.raises(ProtocolError, match="HELLO"):
        ring.submit(A, 0, content(0))
    ring.open(A, 2)
    ring.submit(A, 0, content(0))
    with pytest.raises(ProtocolError, match="seq 0 is outstanding"):
        ring.submit(A, 0, content(1))
    ring.submit(A, 1, content(1))
    with pytest.raises(ProtocolError, match="2 credits"):
        ring.submit(A, 2, content(2))
    first, _ = fill_all(ring)
    with pytest.raises(ProtocolError, match="2 credits"):  # a lease takes a credit as a queued request does
        ring.submit(A, 2, content(2))
    ring.release(A, first.id)
    ring.submit(A, 0, content(2))  # a seq may come back once it is over
    assert ring.counters["submitted"] == 3


def test_stale_foreign_and_early_releases_are_counted_and_change_nothing() -> None:
    ring, clock = make()
    ring.open(A, 2)
    ring.open(B, 2)
    ring.submit(A, 0, content(0))
    (fill,) = ring.schedule().fills
    deadline = ring.next_deadline()
    clock.now += 1
    early = ring.leases(A)[0]
    assert not ring.release(A, early.id)  # not announced yet: the worker writes to the slot
    assert ring.lease(A, early.id) is None
    (lease,) = ring.filled(fill.slot, fill.generation)
    assert not ring.release(B, lease.id)
    assert ring.lease(B, lease.id) is None
    assert not ring.release(C, lease.id)
    assert not ring.release(A, lease.id + 1)
    assert ring.next_deadline() == deadline
    assert ring.counters["stale_release"] == 4
    assert ring.leases(A) == [lease]
    assert ring.release(A, lease.id)
    assert not ring.release(A, lease.id)
    assert ring.counters["stale_release"] == 5
    assert ring.counters["released"] == 1


def test_stale_reports_of_the_worker_are_counted_and_change_nothing() -> None:
    ring, _ = make()
    ring.open(A, 2)
    ring.submit(A, 0, content(0))
    (fill,) = ring.schedule().fills
    for slot, generation in ((fill.slot, 2), (fill.slot, 0), (1, 0), (-1, 1), (99, 1)):
        assert ring.filled(slot, generation) == []
        assert ring.failed(slot, generation) == []
    assert ring.counters["stale_fill"] == 10
    assert len(ring.filled(fill.slot, fill.generation)) == 1
    assert ring.filled(fill.slot, fill.generation) == []
    assert ring.failed(fill.slot, fill.generation) == []
    assert ring.counts()["ready"] == 1


def test_a_failed_fill_ends_all_requests_of_the_slot() -> None:
    ring, _ = make(num_slots=3, max_holders=2)
    ring.open(A, 2)
    ring.open(B, 2)
    ring.submit(A, 5, content(1))
    ring.submit(B, 6, content(1))
    (fill,) = ring.schedule().fills
    assert [(lease.holder, lease.seq) for lease in ring.failed(fill.slot, fill.generation)] == [(A, 5), (B, 6)]
    assert (ring.outstanding(A), ring.outstanding(B), ring.busy) == (0, 0, 0)
    ring.submit(A, 5, content(1))
    assert [fill.generation for fill in ring.schedule().fills] == [1]  # another slot, filled for the first time


def test_closing_frees_what_is_ready_and_leaves_what_the_worker_writes() -> None:
    ring, _ = make(num_slots=4, max_holders=1)
    ring.open(A, 4)
    ring.submit(A, 0, content(0))
    fill_all(ring)
    ring.submit(A, 1, content(1))
    (fill,) = ring.schedule().fills
    ring.close(A)
    ring.close(A)
    assert ring.counts() == {"free": 3, "filling": 1, "ready": 0, "quarantined": 0}
    assert ring.filled(fill.slot, fill.generation) == []
    assert ring.counts()["free"] == 4
    assert ring.counters["stale_fill"] == 0


def test_a_silent_holder_expires_with_all_its_leases() -> None:
    ring, clock = make(ttl_s=10.0)
    assert ring.next_deadline() is None
    ring.open(A, 3)
    ring.submit(A, 0, content(0))
    ring.submit(A, 1, content(1))
    (first, second) = fill_all(ring)
    clock.now += 4
    ring.open(B, 1)
    assert ring.next_deadline() == 110.0
    clock.now = 109.9
    assert ring.expire() == []
    clock.now = 110.0
    assert ring.expire() == [A]
    assert "1 holders" in repr(ring)
    assert (ring.counts()["free"], ring.counters["expired"]) == (4, 1)
    assert not ring.release(A, first.id)
    assert not ring.release(B, second.id)
    assert ring.next_deadline() == 114.0


@pytest.mark.parametrize("call", ["submit", "borrow", "release", "renew"])
def test_any_valid_call_renews_all_leases(call: str) -> None:
    ring, clock = make(ttl_s=10.0)
    ring.open(A, 3, reader=7)
    ring.submit(A, 0, content(0))
    ring.submit(A, 1, content(1))
    first, second = fill_all(ring)
    clock.now += 9
    if call == "submit":
        ring.submit(A, 2, content(2))
    elif call == "borrow":
        ring.borrow(A, first.id)
    elif call == "release":
        assert ring.release(A, first.id)
    else:
        assert ring.renew(A)
    clock.now += 9
    assert ring.expire() == []
    assert ring.lease(A, second.id) == second


def test_refused_calls_do_not_renew() -> None:
    ring, clock = make(ttl_s=10.0)
    ring.open(A, 1)
    ring.submit(A, 0, content(0))
    clock.now += 9
    with pytest.raises(ProtocolError):
        ring.submit(A, 0, content(0))
    with pytest.raises(ProtocolError):
        ring.borrow(A, 77)
    assert not ring.release(A, 77)
    assert not ring.renew(B)
    assert ring.next_deadline() == 110.0


def test_reset_voids_everything_and_keeps_counting() -> None:
    ring, _ = make(num_slots=3, max_holders=2)
    ring.open(A, 2)
    ring.open(B, 2)
    ring.submit(A, 0, content(0))
    (ready,) = fill_all(ring)
    ring.submit(A, 1, content(1))
    (late,) = ring.schedule().fills
    ring.submit(B, 0, content(2))
    ring.reset()
    assert (ring.counts()["free"], ring.queued(), ring.next_deadline()) == (3, 0, None)
    assert not ring.renew(A)
    assert not ring.renew(B)
    assert ring.filled(late.slot, late.generation) == []
    assert not ring.release(A, ready.id)
    with pytest.raises(ProtocolError):
        ring.submit(A, 3, content(3))
    ring.open(A, 2)
    for number in range(2):
        ring.submit(A, number, content(number))
    leases = fill_all(ring)
    assert {lease.id for lease in leases}.isdisjoint({ready.id, ready.id + 1})
    assert all(lease.generation == (2 if lease.slot in {ready.slot, late.slot} else 1) for lease in leases)
    assert ring.counters["resets"] == 1


def test_repr_shows_slots_holders_and_queue() -> None:
    ring, _ = make()
    assert repr(ring) == "Ring(4 slots: 4 free, 0 filling, 0 ready, 0 quarantined; 0 holders, 0 queued)"
