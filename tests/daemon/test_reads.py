"""Reads of artifacts: in turn, few at a time, and none for a session that is over."""

from __future__ import annotations

from specd.daemon.reads import IN_WORKER, Reads
from specd.worker.messages import ReadArtifact


def read(session: bytes, offset: int) -> ReadArtifact:
    return ReadArtifact(session=session, name="embedding", offset=offset, length=1)


def test_few_are_sent_at_a_time_and_in_turn() -> None:
    reads = Reads()
    asked = [read(b"ab"[number % 2 :][:1], number) for number in range(2 * IN_WORKER)]
    for each in asked:
        reads.add(each)
    assert reads.next() == asked[:IN_WORKER]
    assert reads.next() == []
    reads.done(b"a")
    assert reads.next() == [asked[IN_WORKER]]
    assert (reads.of(b"a"), reads.of(b"b"), len(reads)) == (IN_WORKER - 1, IN_WORKER, 2 * IN_WORKER - 1)


def test_a_session_that_is_over_costs_no_more_than_the_worker_has() -> None:
    reads = Reads()
    for number in range(3 * IN_WORKER):
        reads.add(read(b"gone", number))
    reads.add(read(b"here", 0))
    reads.next()
    reads.drop(b"gone")
    assert len(reads) == IN_WORKER + 1
    for _ in range(IN_WORKER):
        reads.done(b"gone")
    assert [each.session for each in reads.next()] == [b"here"]
    reads.done(b"unknown")
    reads.died()
    assert len(reads) == 0
