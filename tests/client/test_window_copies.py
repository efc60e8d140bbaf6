"""Copies: batches that several daemons were asked for, daemons that are late, and slots that are too small."""

from __future__ import annotations

import msgspec
import pytest

from specd.client.effects import Abandon, Cancel, FetchSlot, Missed, SendRelease, SendSubmit
from specd.client.pending import Pending, State
from specd.client.window import Window
from specd.errors import BatchError, ProtocolError
from windows import BUFFER, SLOT, Clock, Token, added, fetched, item, make, ready, show_pace

ONE, TWO, AGAIN = Token("one"), Token("two"), Token("again")


def two_known(seconds: float = 0.01, credits: int = 3) -> tuple[Window[Token, Token], Clock]:
    """A window over two daemons that have shown their pace: 0.01 s a batch, and another."""
    clock = Clock()
    window = make(2, clock)
    window.opened(0, ONE, credits, SLOT)
    window.opened(1, TWO, credits, SLOT)
    show_pace(window, clock, 0, 0.01)
    show_pace(window, clock, 1, seconds)
    return window, clock


def test_the_first_batch_is_asked_of_another_when_it_is_late_and_whoever_is_first_brings_it() -> None:
    window, clock = two_known()
    one, two, three = added(window, 3)
    assert [pending.daemon for pending in (one, two, three)] == [0, 1, 0]
    clock.now += 1.5
    fetched(window, two, 2)
    clock.now += 0.4
    assert window.tick() == [], "not yet"
    clock.now += 0.2
    (hedge,) = window.tick()
    assert isinstance(hedge, SendSubmit)
    assert (hedge.session, hedge.pending, round(hedge.late, 1)) == (TWO, one, 2.1)
    assert window.tick() == [], "it is asked for once"
    assert window.ready(TWO, ready(one, 3)) == [FetchSlot(TWO, one)]
    assert window.begin(one, TWO) is not None
    assert window.fetched(one, BUFFER, 0.0) == [SendRelease(TWO, 3)]
    window.take()
    window.take()
    assert window.tick() == [SendSubmit(TWO, three, hedge.late)], "what is late is late at once when its turn comes"
    four = item(3)
    assert window.add([four]) == [SendSubmit(TWO, four)], "who is late gets nothing more"
    assert window._peers[0].room == 1
    assert window.ready(ONE, ready(one, 4)) == [SendRelease(ONE, 4)], "the other brought it"
    assert window._peers[0].room == 2
    assert window.ready(ONE, ready(three, 5)) == [FetchSlot(ONE, three)], "now this one was first"
    assert window.ready(TWO, ready(three, 6)) == [SendRelease(TWO, 6)]
    with pytest.raises(ProtocolError, match="daemon-1 announced seq 3, which was not asked for"):
        window.ready(TWO, ready(three, 6))
    assert (one.submissions, three.submissions, window.resubmitted) == (2, 2, 0)


def test_nobody_is_asked_for_what_is_late_who_would_bring_it_later_still() -> None:
    window, clock = two_known(seconds=10.0)
    (one,) = added(window, 1)
    assert one.daemon == 0
    clock.now += 9.5
    assert window.tick() == []
    clock.now += 1.0
    assert [effect.session for effect in window.tick() if isinstance(effect, SendSubmit)] == [TWO]


def test_nobody_is_asked_for_what_is_late_who_never_answered_or_does_not_now() -> None:
    clock = Clock()
    window = make(2, clock)
    window.opened(0, ONE, 1, SLOT)
    window.opened(1, TWO, 1, SLOT)
    one, two = added(window, 2)
    clock.now += 5.0
    assert window.tick() == [], "both may be compiling"
    window.ready(TWO, ready(two, 1))
    window.begin(two, TWO)
    assert window.fetched(two, BUFFER, 0.0) == [SendRelease(TWO, 1), SendSubmit(TWO, one)], "it is measured once more"
    assert window.ready(TWO, ready(one, 2)) == [FetchSlot(TWO, one)]
    assert one.daemon == 1


def test_a_batch_that_two_were_asked_for_falls_back_to_the_other() -> None:
    window, clock = two_known()
    (one,) = added(window, 1)
    clock.now += 3.0
    window.tick()
    assert window.lost(ONE, "it died") == []
    assert (one.state, one.daemon, window.resubmitted) == (State.SUBMITTED, 1, 0)
    assert window.opened(0, AGAIN, 3, SLOT) == [SendSubmit(AGAIN, one)], "a copy, which measures it"
    window.ready(TWO, ready(one, 1))
    window.begin(one, TWO)
    assert window.missed(one, "stale", 0.0, lost=False) == [Missed(TWO, one, "stale"), SendRelease(TWO, 1)]
    assert (one.state, one.daemon) == (State.SUBMITTED, 0)
    assert window.failed(AGAIN, one.seq, "no memory") == []
    with pytest.raises(BatchError, match="cannot be captured: no memory"):
        window.here()


def test_one_of_two_that_cannot_capture_a_batch_leaves_it_to_the_other() -> None:
    window, clock = two_known()
    (one,) = added(window, 1)
    clock.now += 3.0
    window.tick()
    assert window.failed(ONE, one.seq, "no memory") == []
    assert not window.here()
    assert [peer.room for peer in window._peers] == [3, 2]
    assert window.ready(TWO, ready(one, 1)) == [FetchSlot(TWO, one)]


def test_a_daemon_that_was_not_asked_for_long_is_measured_by_a_copy_of_the_last_batch() -> None:
    window, clock = two_known(seconds=0.2)
    one, two, three = added(window, 3)
    assert [pending.daemon for pending in (one, two, three)] == [0, 0, 0]
    clock.now += 3.9
    for lease, pending in enumerate((one, two), 1):
        fetched(window, pending, lease)
    assert not window._peers[1].held
    clock.now += 0.2
    assert window.tick() == [SendSubmit(TWO, three)]
    fetched(window, three, 3)
    assert window.ready(TWO, ready(three, 4)) == [SendRelease(TWO, 4)]
    assert window._peers[1].room == 3


def test_dropped_copies_are_released_as_they_come() -> None:
    window, clock = two_known()
    (one,) = added(window, 1)
    clock.now += 3.0
    window.tick()
    assert window.drop() == []
    assert window.ready(TWO, ready(one, 1)) == [SendRelease(TWO, 1)]
    assert window.ready(ONE, ready(one, 2)) == [SendRelease(ONE, 2)]
    assert [peer.room for peer in window._peers] == [3, 3]


def test_a_transfer_that_does_not_end_is_cancelled_if_another_daemon_could_bring_its_batch() -> None:
    window, clock = two_known()
    one, two, three = added(window, 3)
    fetched(window, one, 1)  # half a second
    window.ready(TWO, ready(two, 2))
    window.ready(ONE, ready(three, 3))
    window.begin(three, ONE)
    clock.now += 2.4
    assert window.tick() == []
    clock.now += 0.2
    assert window.tick() == [Cancel(ONE, "a transfer has not ended for 2.6 s")]
    assert window.tick() == []
    assert window.missed(three, "cancelled", 2.6, lost=True) == [
        Abandon(ONE, "cancelled"), Missed(ONE, three, "cancelled"), SendSubmit(TWO, three),
    ]  # fmt: skip


def test_batches_go_only_where_they_fit() -> None:
    window = make(2)
    small = item(0).layout.nbytes
    window.opened(0, ONE, 3, small - 1)
    one, two = item(0), item(1)
    assert window.add([one]) == [], "another daemon may come"
    assert window.opened(1, TWO, 1, small) == [SendSubmit(TWO, one)]
    assert window.add([two]) == [], "it waits for the one that it fits"
    fetched(window, one, 1)
    assert two.daemon == 1
    window.take()
    assert window.lost(TWO, "it died") == []
    assert not window.here()
    window.opened(1, AGAIN, 1, small - 4)
    with pytest.raises(
        BatchError, match=rf"batch 1 .* needs {small} bytes and the largest slot .* has {small - 1}: .*ring.slot_tokens"
    ):
        window.here()


def test_images_go_to_a_daemon_that_takes_as_many_bytes_of_them() -> None:
    window = make(2)
    one, two = (
        Pending[Token, Token](
            msgspec.structs.replace(each.batch, payloads=(bytes(each.batch.index + 9),)),
            each.identity,
            each.layout,
            each.spec,
        )
        for each in (item(0), item(1))
    )
    window.opened(0, ONE, 3, SLOT, 0)
    window.opened(1, TWO, 3, SLOT, 9)
    assert window.add([one]) == [SendSubmit(TWO, one)]
    assert window.add([two]) == []
    fetched(window, one, 1)
    window.take()
    with pytest.raises(BatchError, match=r"batch 1 .* brings 10 bytes of payloads and a daemon takes 9: .*payload_mib"):
        window.here()
