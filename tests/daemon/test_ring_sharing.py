"""How holders share the ring: one slot for many, turns, the slot guarantee, orphans."""

from __future__ import annotations

from rings import A, B, C, content, fill_all, make
from specd.daemon.slots import Grant


def test_the_same_content_joins_a_filling_slot() -> None:
    ring, _ = make()
    ring.open(A, 2)
    ring.open(B, 2)
    ring.submit(A, 0, content(1))
    (fill,) = ring.schedule().fills
    ring.submit(B, 0, content(1))
    assert ring.schedule() == ([], [])
    leases = ring.filled(fill.slot, fill.generation)
    assert [(lease.holder, lease.slot) for lease in leases] == [(A, 0), (B, 0)]
    assert ring.counters["joins"] == 1
    ring.release(A, leases[0].id)
    assert ring.counts()["ready"] == 1  # B still reads it
    ring.release(B, leases[1].id)
    assert ring.busy == 0


def test_the_same_content_joins_a_ready_slot_also_for_the_same_holder() -> None:
    ring, _ = make()
    ring.open(A, 3)
    ring.submit(A, 0, content(1))
    (first,) = fill_all(ring)
    ring.submit(A, 1, content(1))
    schedule = ring.schedule()
    assert schedule.fills == []
    assert [(lease.seq, lease.slot, lease.generation) for lease in schedule.ready] == [(1, first.slot, 1)]
    assert schedule.ready[0].id != first.id
    ring.release(A, first.id)
    ring.release(A, schedule.ready[0].id)
    ring.submit(A, 2, content(1))  # the content went with its last lease
    assert len(ring.schedule().fills) == 1


def test_a_holder_may_take_the_pool_but_not_the_slot_of_another() -> None:
    ring, _ = make(num_slots=5, max_holders=3)
    assert ring.open(A, 99) == 3
    ring.open(B, 99)
    for number in range(3):
        ring.submit(A, number, content(number))
    assert len(fill_all(ring)) == 3
    for number in range(3):
        ring.submit(B, number, content(10 + number))
    assert [lease.seq for lease in fill_all(ring)] == [0]  # its own slot; the pool is A's
    ring.open(C, 1)
    ring.submit(C, 0, content(20))
    assert [lease.holder for lease in fill_all(ring)] == [C]
    assert ring.counts()["free"] == 0
    ring.release(A, ring.leases(A)[0].id)
    assert [(lease.holder, lease.seq) for lease in fill_all(ring)] == [(B, 1)]


def test_joining_counts_against_the_cap() -> None:
    ring, _ = make(num_slots=4, max_holders=2)
    ring.open(A, 3)
    ring.open(B, 3)
    for number in range(3):
        ring.submit(A, number, content(1))
        ring.submit(B, number, content(1))
    assert [lease.holder for lease in fill_all(ring)] == [A, B, A, B]  # two extras in all, though one slot is in use
    assert ring.busy == 1


def test_round_robin_over_holders_first_in_first_out_inside_one() -> None:
    ring, _ = make(num_slots=8, max_holders=2)
    ring.open(A, 4)
    ring.open(B, 4)
    for number in range(4):
        ring.submit(A, number, content(number))
    for number in range(2):
        ring.submit(B, number, content(10 + number))
    order = [fill.batch_id[-1] for fill in ring.schedule().fills]
    assert order == [0, 10, 1, 11, 2, 3]


def test_the_turn_survives_between_calls() -> None:
    ring, _ = make(num_slots=3, max_holders=2)  # one shared slot
    ring.open(A, 2)
    ring.open(B, 2)
    winners = []
    for number in range(0, 12, 2):
        for holder in (A, B):
            while ring.outstanding(holder) < 2:
                seq = number * 10 + ring.outstanding(holder) + (100 if holder == B else 0) + ring.counters["submitted"]
                ring.submit(holder, seq, content(1000 + ring.counters["submitted"]))
        fill_all(ring)
        extra = A if len(ring.leases(A)) == 2 else B
        winners.append(extra)
        ring.release(extra, ring.leases(extra)[0].id)
    assert winners.count(A) == winners.count(B) == 3


def test_a_blocked_head_does_not_block_other_holders() -> None:
    ring, _ = make(num_slots=2, max_holders=2)
    ring.open(A, 1)
    ring.open(B, 1)
    ring.submit(A, 0, content(0))
    fill_all(ring)
    ring.close(B)
    ring.open(B, 1)
    ring.submit(B, 0, content(1))
    assert [lease.holder for lease in fill_all(ring)] == [B]


def test_an_orphan_is_not_reused_until_the_worker_reports_it() -> None:
    ring, _ = make(num_slots=1, max_holders=1)
    ring.open(A, 1)
    ring.submit(A, 0, content(0))
    (fill,) = ring.schedule().fills
    ring.close(A)
    ring.open(B, 1)
    ring.submit(B, 0, content(1))
    assert ring.schedule().fills == []
    assert ring.failed(fill.slot, fill.generation) == []
    assert ring.schedule().fills == [Grant(0, 2, content(1), B, 0)]


def test_orphans_are_charged_to_the_pool() -> None:
    ring, _ = make(num_slots=4, max_holders=2)
    ring.open(A, 3)
    for number in range(3):
        ring.submit(A, number, content(number))
    fills = ring.schedule().fills
    assert len(fills) == 3
    ring.open(A, 3)
    for number in range(3):
        ring.submit(A, number, content(10 + number))
    assert len(ring.schedule().fills) == 1  # the last free slot: it is A's own
    ring.open(B, 1)
    ring.submit(B, 0, content(20))
    assert ring.schedule().fills == []
    ring.filled(fills[0].slot, fills[0].generation)
    assert [fill.batch_id for fill in ring.schedule().fills] == [content(20)]  # B's own comes before A's extras
    ring.filled(fills[1].slot, fills[1].generation)
    assert [fill.batch_id for fill in ring.schedule().fills] == [content(11)]


def test_a_resubmitted_batch_adopts_its_orphan() -> None:
    ring, _ = make(num_slots=2, max_holders=2)
    ring.open(A, 1)
    ring.submit(A, 0, content(1))
    (fill,) = ring.schedule().fills
    ring.open(A, 1)
    ring.submit(A, 0, content(1))
    assert ring.schedule() == ([], [])
    assert [(lease.holder, lease.seq) for lease in ring.filled(fill.slot, fill.generation)] == [(A, 0)]


def test_adopting_an_orphan_needs_no_more_of_the_pool_than_it_has() -> None:
    ring, _ = make(num_slots=3, max_holders=2)  # one shared slot
    ring.open(B, 2)
    ring.open(A, 2)
    ring.submit(A, 0, content(1))
    ring.schedule()
    ring.close(A)  # its slot is an orphan and takes the shared one's place
    ring.submit(B, 0, content(2))
    assert len(ring.schedule().fills) == 1
    ring.submit(B, 1, content(1))
    assert ring.schedule() == ([], [])
    assert [lease.slot for lease in ring.leases(B)] == [1, 0]


def test_reopening_goes_to_the_end_of_the_queue() -> None:
    ring, _ = make(num_slots=2, max_holders=2)
    ring.open(A, 1)
    ring.open(B, 1)
    ring.submit(A, 0, content(0))
    (first,) = ring.schedule().fills
    ring.open(A, 1)
    ring.submit(A, 0, content(1))
    (second,) = ring.schedule().fills
    ring.open(A, 1)
    ring.submit(A, 0, content(2))
    ring.submit(B, 0, content(3))  # last to ask, but both slots are A's orphans
    assert ring.schedule().fills == []
    ring.filled(first.slot, first.generation)
    assert [fill.batch_id for fill in ring.schedule().fills] == [content(3)]
    ring.filled(second.slot, second.generation)
    assert [fill.batch_id for fill in ring.schedule().fills] == [content(2)]
