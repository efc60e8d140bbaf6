"""Borrowed slots: read in place, quarantined when their holder ends first, and the effect on other holders."""

from __future__ import annotations

import pytest

from rings import A, B, C, content, fill_all, make
from specd.daemon.ring import Ring
from specd.daemon.slots import Lease
from specd.errors import ProtocolError

D = b"d"
READER, OTHER = 11, 12


def lease_one(ring: Ring, holder: bytes, number: int) -> Lease:
    """Have the holder lease a slot with this content."""
    ring.submit(holder, number, content(number))
    (lease,) = [lease for lease in fill_all(ring) if lease.holder == holder]
    return lease


def free(ring: Ring) -> int:
    return ring.counts()["free"]


def quarantined(ring: Ring) -> int:
    return ring.counts()["quarantined"]


def test_release_ends_a_borrowed_lease() -> None:
    ring, _ = make()
    ring.open(A, 2, READER)
    lease = lease_one(ring, A, 0)
    ring.borrow(A, lease.id)
    ring.borrow(A, lease.id)
    assert ring.counts()["ready"] == 1
    assert ring.release(A, lease.id)
    ring.close(A)
    assert (free(ring), ring.quarantined(READER)) == (4, 0)


@pytest.mark.parametrize("end", ["close", "open", "expire"])
def test_a_slot_whose_borrower_ended_is_not_filled_again_before_its_process_is_dead(end: str) -> None:
    ring, clock = make(num_slots=2, max_holders=1, ttl_s=10.0)
    ring.open(A, 2, READER)
    kept, copied = lease_one(ring, A, 0), lease_one(ring, A, 1)
    ring.borrow(A, kept.id)
    if end == "close":
        ring.close(A)
    elif end == "open":
        assert ring.open(A, 2, OTHER) == 2
        ring.close(A)
    else:
        clock.now += 10
        assert ring.expire() == [A]
    assert ring.counts() == {"free": 1, "filling": 0, "ready": 0, "quarantined": 1}
    assert ring.quarantined(READER) == 1
    assert not ring.release(A, kept.id)
    ring.open(B, 2, OTHER)
    for number in range(10, 14):
        lease = lease_one(ring, B, number)
        assert lease.slot == copied.slot
        ring.release(B, lease.id)
    ring.dead(OTHER)
    assert quarantined(ring) == 1
    ring.dead(READER)
    ring.dead(READER)
    assert (free(ring), quarantined(ring)) == (2, 0)
    slots = {lease_one(ring, B, number).slot for number in (20, 21)}
    assert slots == {kept.slot, copied.slot}


def test_what_cannot_be_borrowed() -> None:
    ring, _ = make()
    ring.open(A, 2, READER)
    ring.open(B, 2)
    ring.submit(A, 0, content(0))
    (fill,) = ring.schedule().fills
    early = ring.leases(A)[0]
    with pytest.raises(ProtocolError, match="expected a READY lease of this session"):
        ring.borrow(A, early.id)
    ring.filled(fill.slot, fill.generation)
    for holder in (B, C):
        with pytest.raises(ProtocolError, match="expected a READY lease of this session"):
            ring.borrow(holder, early.id)
    ring.release(A, early.id)
    with pytest.raises(ProtocolError, match=f"lease {early.id} cannot be borrowed: expected a READY lease"):
        ring.borrow(A, early.id)
    unwatched = lease_one(ring, B, 1)
    with pytest.raises(ProtocolError, match=r"cannot watch the trainer's process.*subscriber\.borrow=false"):
        ring.borrow(B, unwatched.id)
    ring.close(A)
    ring.close(B)
    assert quarantined(ring) == 0


def test_leases_of_others_on_a_quarantined_slot_go_on_and_requests_may_join_it() -> None:
    ring, _ = make(num_slots=4, max_holders=2)
    ring.open(A, 2, READER)
    ring.open(B, 3, OTHER)
    mine, theirs = lease_one(ring, A, 1), lease_one(ring, B, 1)
    assert mine.slot == theirs.slot
    ring.borrow(A, mine.id)
    ring.close(A)
    assert ring.lease(B, theirs.id) == theirs
    assert ring.release(B, theirs.id)
    assert quarantined(ring) == 1
    again = lease_one(ring, B, 1)  # the bytes are still there: no second forward
    assert (again.slot, again.generation, ring.counters["fills"]) == (mine.slot, mine.generation, 1)
    ring.dead(READER)
    assert ring.counts() == {"free": 3, "filling": 0, "ready": 1, "quarantined": 0}
    ring.release(B, again.id)
    assert free(ring) == 4


def test_a_slot_two_dead_sessions_borrowed_waits_for_both_processes() -> None:
    ring, _ = make(num_slots=2, max_holders=2)
    for holder, reader in ((A, READER), (B, OTHER)):
        ring.open(holder, 1, reader)
        ring.borrow(holder, lease_one(ring, holder, 1).id)
    ring.close(A)
    ring.close(B)
    assert quarantined(ring) == 1
    ring.dead(OTHER)
    assert (quarantined(ring), ring.quarantined(READER), ring.quarantined(OTHER)) == (1, 1, 0)
    ring.dead(READER)
    assert free(ring) == 2


def test_quarantine_takes_from_the_pool_first() -> None:
    ring, _ = make(num_slots=4, max_holders=2)
    ring.open(A, 2, READER)
    for number in range(2):
        ring.borrow(A, lease_one(ring, A, number).id)
    ring.close(A)
    assert ring.open(B, 3) == 3
    assert ring.open(C, 3) == 3
    lease_one(ring, B, 10)
    ring.submit(B, 11, content(11))
    assert fill_all(ring) == []  # the pool of two is quarantined
    assert lease_one(ring, C, 20).holder == C  # and C's own slot is not touched
    ring.dead(READER)
    assert [lease.seq for lease in fill_all(ring)] == [11]


def test_a_holder_is_not_let_in_while_quarantine_leaves_it_no_slot_of_its_own() -> None:
    ring, _ = make(num_slots=3, max_holders=3)
    ring.open(A, 1, READER)
    ring.open(B, 1)
    ring.borrow(A, lease_one(ring, A, 0).id)
    ring.close(A)
    assert ring.open(C, 1) == 1
    assert ring.open(D, 1) is None  # three places, one of them still A's
    assert [lease_one(ring, B, 1).holder, lease_one(ring, C, 2).holder] == [B, C]
    ring.dead(READER)
    assert ring.open(D, 1) == 1
    assert lease_one(ring, D, 3).holder == D


def test_extras_that_were_taken_before_the_quarantine_delay_the_next_holder_until_they_end() -> None:
    ring, _ = make(num_slots=3, max_holders=2)  # one shared slot
    ring.open(A, 1, READER)
    ring.open(B, 2)
    ring.borrow(A, lease_one(ring, A, 0).id)
    first = lease_one(ring, B, 1)
    lease_one(ring, B, 2)
    ring.close(A)
    assert ring.open(C, 1) is None  # B has two slots, the third is quarantined
    ring.release(B, first.id)
    ring.submit(B, 3, content(3))
    assert fill_all(ring) == []  # B gets no second slot any more, so that C is not kept out for ever
    assert ring.open(C, 1) == 1
    assert lease_one(ring, C, 4).holder == C


def test_a_process_that_reconnects_gets_fewer_credits_and_at_last_none() -> None:
    ring, _ = make(num_slots=6, max_holders=3)  # at most four slots for one
    granted = []
    for number in range(4):
        granted.append(ring.open(A, 9, READER))
        ring.borrow(A, lease_one(ring, A, number).id)
        ring.close(A)
    assert granted == [4, 3, 2, 1]
    assert ring.open(A, 9, READER) is None
    assert [ring.open(B, 9, OTHER), ring.open(C, 9)] == [4, 4]  # the places of others are theirs
    assert {lease_one(ring, B, 10).holder, lease_one(ring, C, 11).holder} == {B, C}
    assert ring.open(D, 1) is None
    ring.dead(READER)
    assert ring.open(A, 9, READER) == 4


def test_the_worker_s_death_ends_all_quarantine() -> None:
    ring, _ = make(num_slots=2, max_holders=2)
    ring.open(A, 1, READER)
    ring.open(B, 1, OTHER)
    for holder, number in ((A, 0), (B, 1)):
        ring.borrow(holder, lease_one(ring, holder, number).id)
    ring.close(A)
    ring.reset()
    assert ring.counts() == {"free": 2, "filling": 0, "ready": 0, "quarantined": 0}
    assert [ring.open(A, 1, READER), ring.open(B, 1)] == [1, 1]
    ring.dead(READER)
    assert {lease_one(ring, A, 5).generation, lease_one(ring, B, 6).generation} == {2}
