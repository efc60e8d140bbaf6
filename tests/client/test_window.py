"""The window: each transition of a batch, and what is to be done for it."""

from __future__ import annotations

import msgspec
import pytest

from specd.client.effects import (
    Abandon,
    FetchSlot,
    Missed,
    Recycle,
    Return,
    SendBorrow,
    SendRecvReady,
    SendRelease,
    SendSubmit,
    Unborrow,
)
from specd.client.pending import State
from specd.client.window import Window
from specd.errors import BatchError, ProtocolError
from specd.protocol.batch import Layout
from specd.protocol.capture import CaptureSpec
from specd.transports.base import SlotRef
from windows import BUFFER, MORE, SLOT, SPEC, Clock, Token, added, fetched, item, make, ready

ONE, TWO, AGAIN = Token("one"), Token("two"), Token("again")
VIEW = Token("view")


def lending(credits: int, num_daemons: int = 1) -> Window[Token, Token]:
    """A window with a session whose slots are borrowed."""
    window = make(num_daemons)
    window.opened(0, ONE, credits, SLOT, borrow=True, announce=True)
    return window


def test_one_batch_from_add_to_give_back() -> None:
    window = make()
    assert window.opened(0, ONE, 2, SLOT) == []
    pending = item(7)
    assert window.add([pending]) == [SendSubmit(ONE, pending)]
    assert (pending.seq, pending.submissions, pending.state, window.here()) == (1, 1, State.SUBMITTED, False)
    assert pending.request(b"e" * 16).seq == 1
    assert window.ready(ONE, ready(pending, 5, target_us=2_000_000)) == [FetchSlot(ONE, pending)]
    assert (pending.state, pending.forward_s) == (State.READY, 2.0)
    assert window.begin(pending, ONE) == SlotRef(5, 1, pending.layout.nbytes)
    assert pending.state is State.FETCHING
    assert window.fetched(pending, BUFFER, 0.25) == [SendRelease(ONE, 5)]
    assert (window.here(), pending.fetch_s, repr(window)) == (True, 0.25, "Window(1 is here; 0 in use)")
    assert window.take() == []
    assert (pending.state, pending.buffer, len(window), window.in_use) == (State.USED, BUFFER, 0, [pending])
    assert repr(window) == "Window(nothing in flight; 1 in use)"
    assert window.give_back(pending) == [Recycle(BUFFER)]
    assert window.give_back(pending) == [], "it is given back once"
    assert (pending.state, pending.buffer, window.in_use) == (State.OVER, None, [])


def test_a_borrowed_batch_keeps_its_lease_until_the_training_stream_has_read_it() -> None:
    window = lending(credits=1)
    one, two = added(window, 2)
    assert window.ready(ONE, ready(one, 5)) == [SendBorrow(ONE, 5), FetchSlot(ONE, one)], "what lends announces nothing"
    ref = window.begin(one, ONE)
    assert window.fetched(one, VIEW, 0.0) == []
    assert window.take() == []
    assert one.buffer is VIEW
    assert window.give_back(one) == [Return(ONE, SlotRef(5, 1, one.layout.nbytes), one)]
    assert ref == SlotRef(5, 1, one.layout.nbytes)
    assert two.state is State.PENDING
    assert window.returned(one) == [SendRelease(ONE, 5), SendSubmit(ONE, two)], "and its credit"


def test_what_lies_in_pieces_is_copied_instead_of_borrowed() -> None:
    window = lending(credits=2)
    first, second = added(window, 2)
    assert window.ready(ONE, ready(first, 5, held=MORE)) == [SendRecvReady(ONE, 5), FetchSlot(ONE, first)]
    begun = window.begin(first, ONE)
    assert begun is not None
    assert begun.pieces
    assert window.fetched(first, BUFFER, 0.1) == [SendRelease(ONE, 5)], "its lease ends with the copy"
    also_final = msgspec.structs.replace(SPEC, final=True)
    assert window.ready(ONE, ready(second, 6, held=also_final)) == [
        SendBorrow(ONE, 6),
        FetchSlot(ONE, second),
    ], "what it wants lies there in one stretch"


def test_who_needs_recv_ready_is_told_before_the_transfer() -> None:
    window = make()
    window.opened(0, ONE, 1, SLOT, announce=True)
    (pending,) = added(window, 1)
    assert window.ready(ONE, ready(pending, 5)) == [SendRecvReady(ONE, 5), FetchSlot(ONE, pending)]


def test_batches_go_evenly_to_daemons_of_which_nothing_is_known() -> None:
    window = make(3)
    window.opened(0, ONE, 2, SLOT)
    window.opened(2, TWO, 3, SLOT)
    batches = [item(index) for index in range(7)]
    order = [
        ONE,
        TWO,
        ONE,
        TWO,
    ]  # with as much to do, the first of the endpoints; more when there is something to go by
    assert window.add(batches) == [SendSubmit(session, batches[i]) for i, session in enumerate(order)]
    assert [pending.state for pending in batches[5:]] == [State.PENDING] * 2
    fetched(window, batches[0], 9)
    assert (batches[4].daemon, batches[5].daemon) == (0, None)
    assert window.opened(1, AGAIN, 8, SLOT) == [SendSubmit(AGAIN, batches[5]), SendSubmit(AGAIN, batches[6])]


def test_nothing_is_taken_out_of_order() -> None:
    window = make()
    window.opened(0, ONE, 2, SLOT)
    one, two = added(window, 2)
    fetched(window, two, 2)
    assert not window.here()
    with pytest.raises(AssertionError, match=r"batch 0 of epoch 0 .* is being captured"):
        window.take()
    fetched(window, one, 1)
    assert window.first is one
    assert window.take() == []
    assert window.first is two
    assert window.here()


def test_a_lost_session_takes_its_leases_along_and_its_batches_are_submitted_elsewhere() -> None:
    window = make(2)
    window.opened(0, ONE, 3, SLOT)
    here, on_the_way, asked = added(window, 3)
    fetched(window, here, 1)
    window.ready(ONE, ready(on_the_way, 2))
    assert window.lost(ONE, "it died") == []
    assert window.opened(1, TWO, 1, SLOT) == [SendSubmit(TWO, on_the_way)]
    assert window.lost(ONE, "it died") == []
    assert [pending.state for pending in (here, on_the_way, asked)] == [State.FETCHED, State.SUBMITTED, State.PENDING]
    assert (window.resubmitted, on_the_way.submissions, asked.submissions) == (2, 2, 1)
    assert window.begin(on_the_way, ONE) is None, "its transfer was asked for, but it is another's now"
    assert window.ready(ONE, ready(asked, 3)) == [], "late"
    assert window.failed(ONE, asked.seq, "late") == []
    assert window.opened(0, AGAIN, 1, SLOT) == [SendSubmit(AGAIN, asked)]
    assert window.ready(TWO, ready(on_the_way, 4)) == [FetchSlot(TWO, on_the_way)]
    assert window.begin(on_the_way, ONE) is None
    assert window.begin(on_the_way, TWO) is not None
    assert window.begin(on_the_way, TWO) is None, "it has begun"


def test_a_transfer_in_flight_decides_for_itself_when_its_session_is_lost() -> None:
    window = make()
    window.opened(0, ONE, 2, SLOT)
    one, two = added(window, 2)
    for lease, pending in enumerate((one, two)):
        window.ready(ONE, ready(pending, lease))
        assert window.begin(pending, ONE) is not None
    assert window.lost(ONE, "it died") == []
    assert window.resubmitted == 0
    assert window.opened(0, AGAIN, 3, SLOT) == []
    assert window.fetched(one, BUFFER, 0.0) == [], "there is no lease to release"
    assert one.state is State.FETCHED
    assert window.missed(two, "stale", 0.0, lost=True) == [Missed(ONE, two, "stale"), SendSubmit(AGAIN, two)]
    assert window.resubmitted == 1


def test_a_lost_sessions_transfer_takes_a_credit_of_the_next_one_until_it_ends() -> None:
    window = make()
    window.opened(0, ONE, 1, SLOT)
    one, two = added(window, 2)
    window.ready(ONE, ready(one, 1))
    window.begin(one, ONE)
    window.lost(ONE, "it died")
    assert window.opened(0, AGAIN, 1, SLOT) == []
    assert window.fetched(one, BUFFER, 0.0) == [SendSubmit(AGAIN, two)]


def test_a_batch_whose_transfers_fail_is_never_given_up_and_rests_in_between() -> None:
    clock = Clock()
    window = make(clock=clock)
    window.opened(0, ONE, 2, SLOT)
    (pending,) = added(window, 1)
    for lease, rest in enumerate((0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0), 1):
        window.ready(ONE, ready(pending, lease))
        window.begin(pending, ONE)
        then = [] if rest else [SendSubmit(ONE, pending)]
        found = window.missed(pending, "another generation", 0.0, lost=False)
        assert found == [Missed(ONE, pending, "another generation"), SendRelease(ONE, lease), *then]
        if rest:
            clock.now += rest - 1e-3
            assert window.tick() == []
            clock.now += 2e-3
            assert window.tick() == [SendSubmit(ONE, pending)]
    assert (pending.submissions, window.resubmitted, pending.problem) == (10, 9, "another generation")
    assert not window.here()


def test_a_batch_goes_elsewhere_after_its_transfer_failed() -> None:
    window = make(2)
    window.opened(0, ONE, 2, SLOT)
    (pending,) = added(window, 1)
    window.ready(ONE, ready(pending, 1))
    window.begin(pending, ONE)
    window.opened(1, TWO, 2, SLOT)
    assert window.missed(pending, "stale", 0.0, lost=False)[-2:] == [
        SendSubmit(TWO, pending), SendSubmit(ONE, pending),
    ]  # fmt: skip
    assert pending.daemon == 1, "what the other is asked for is a copy"


def test_a_lost_transport_is_hung_up_and_what_was_in_flight_over_it_is_retried() -> None:
    window = make()
    window.opened(0, ONE, 3, SLOT, announce=True)
    batches = one, two, three = added(window, 3)
    for lease, pending in enumerate((one, two)):
        window.ready(ONE, ready(pending, lease))
    window.begin(one, ONE)
    assert window.missed(one, "aborted", 0.0, lost=True) == [Abandon(ONE, "aborted"), Missed(ONE, one, "aborted")]
    assert window.begin(two, ONE) is None
    assert window.lost(ONE, "aborted") == [], "it is already"
    assert {pending.state for pending in batches} == {State.PENDING}
    assert window.opened(0, AGAIN, 3, SLOT) == [SendSubmit(AGAIN, pending) for pending in batches]
    assert window.resubmitted == 3
    assert three.submissions == 2


def test_what_cannot_be_captured_is_named_when_its_turn_comes() -> None:
    window = make()
    window.opened(0, ONE, 2, SLOT)
    one, two, three = added(window, 3)
    assert window.failed(ONE, two.seq, "too long") == [SendSubmit(ONE, three)]
    assert window.failed(ONE, 99, "what?") == []
    fetched(window, one, 1)
    assert window.failed(ONE, one.seq, "too late") == []
    assert window.first is one
    window.take()
    with pytest.raises(BatchError, match=r"batch 1 of epoch 0 \(id .*\) cannot be captured: too long"):
        window.here()


def test_an_announcement_of_something_else_than_was_asked_for_is_refused() -> None:
    window = make(2)
    window.opened(0, ONE, 2, SLOT)
    window.opened(1, TWO, 1, SLOT)
    one, two, three = added(window, 3)
    assert [pending.daemon for pending in (one, three, two)] == [0, 0, 1]
    message = ready(one, 1)
    for session, wrong, match in (
        (ONE, msgspec.structs.replace(message, seq=99), "daemon-0 announced seq 99, which was not asked for"),
        (TWO, message, "daemon-1 announced seq 1, which was not asked for"),
        (ONE, msgspec.structs.replace(message, batch_id=b"x" * 16), f"announced batch 0 .* as id {(b'x' * 16).hex()}"),
        (ONE, msgspec.structs.replace(message, layout=Layout(tensors=(), nbytes=4)), "announced batch 0 .* nbytes=4"),
        (ONE, msgspec.structs.replace(message, held=CaptureSpec(taps=(99,))), "which does not cover CaptureSpec"),
        (ONE, msgspec.structs.replace(message, held=None), "as None, which does not cover CaptureSpec"),
    ):
        with pytest.raises(ProtocolError, match=match):
            window.ready(session, wrong)
    assert window.ready(ONE, message) == [FetchSlot(ONE, one)]
    with pytest.raises(ProtocolError, match="daemon-0 announced seq 1, which was not asked for"):
        window.ready(ONE, message)


@pytest.mark.parametrize("announce", [False, True])
def test_dropped_batches_are_given_up_as_soon_as_they_can_be(announce: bool) -> None:
    window = make()
    window.opened(0, ONE, 4, SLOT, announce=announce)
    here, moving, waiting, asked, pending = batches = added(window, 5)
    fetched(window, here, 1)
    for lease, each in ((2, moving), (3, waiting)):
        window.ready(ONE, ready(each, lease))
    window.begin(moving, ONE)
    done = [] if announce else [SendRelease(ONE, 3)]
    assert window.drop() == [Recycle(BUFFER), *done]
    assert len(window) == 0
    assert window.fetched(moving, VIEW, 0.0) == [SendRelease(ONE, 2), Recycle(VIEW)]
    if announce:  # it is sent, so it must be received
        assert window.begin(waiting, ONE) is not None
        assert window.missed(waiting, "stale", 0.0, lost=False) == [Missed(ONE, waiting, "stale"), SendRelease(ONE, 3)]
    else:
        assert window.begin(waiting, ONE) is None
    assert window.ready(ONE, ready(asked, 4)) == [SendRelease(ONE, 4)], "it is not even announced"
    assert pending.state is State.SUBMITTED, "it had room"
    assert window.lost(ONE, "it died") == []
    assert window.opened(0, AGAIN, 9, SLOT) == []
    assert {each.state for each in batches} == {State.OVER}
    assert window.resubmitted == 0


def test_dropped_borrowed_batches_are_given_back_unseen() -> None:
    window = lending(credits=4)
    here, moving, waiting, used = added(window, 4)
    for lease, pending in enumerate((here, moving, waiting), 1):
        window.ready(ONE, ready(pending, lease))
        if pending is not waiting:
            window.begin(pending, ONE)
    window.fetched(here, VIEW, 0.0)
    assert window.drop() == [Unborrow(ONE), SendRelease(ONE, 1), SendRelease(ONE, 3)]
    assert window.begin(waiting, ONE) is None, "so no view is made of it"
    assert window.fetched(moving, VIEW, 0.0) == [Unborrow(ONE), SendRelease(ONE, 2)]
    assert window.failed(ONE, used.seq, "it died") == []


def test_a_session_lost_under_borrowed_batches_leaves_the_one_in_use() -> None:
    window = lending(credits=4)
    used, here, moving, asked = batches = added(window, 4)
    fetched(window, used, 1, VIEW)
    assert window.take() == []
    fetched(window, here, 2, VIEW)
    window.ready(ONE, ready(moving, 3))
    window.begin(moving, ONE)
    assert window.lost(ONE, "it died") == [Unborrow(ONE)]
    assert (used.state, used.buffer, here.buffer, asked.state) == (State.USED, VIEW, None, State.PENDING)
    assert window.fetched(moving, VIEW, 0.0) == [Missed(ONE, moving, "its session was lost"), Unborrow(ONE)]
    assert window.opened(0, AGAIN, 4, SLOT, borrow=True) == [SendSubmit(AGAIN, pending) for pending in batches[1:]]
    assert window.give_back(used) == [Return(ONE, SlotRef(1, 1, used.layout.nbytes), used)], "its view is still used"
    assert window.returned(used) == []


def test_a_session_lost_before_a_borrowed_batch_is_returned_has_nothing_released() -> None:
    window = lending(credits=1)
    (pending,) = added(window, 1)
    fetched(window, pending, 1, VIEW)
    window.take()
    window.give_back(pending)
    assert window.lost(ONE, "it died") == []
    assert window.returned(pending) == []
    assert window.opened(0, AGAIN, 1, SLOT) == []
    assert pending.state is State.OVER


def test_the_last_borrowed_batch_makes_room_for_the_first() -> None:
    window = lending(credits=3, num_daemons=2)
    window.opened(1, TWO, 2, SLOT, borrow=True)
    one, two, lost, four, five = batches = added(window, 5)
    assert [pending.daemon for pending in batches] == [0, 1, 0, 1, None], "two each, while nothing is known"
    for lease, pending in enumerate((one, two, four), 1):
        fetched(window, pending, lease, VIEW)
    assert window.lost(ONE, "it died") == [Unborrow(ONE), Unborrow(TWO), SendRelease(TWO, 3), SendSubmit(TWO, one)]
    assert [pending.state for pending in batches] == [
        State.SUBMITTED, State.FETCHED, State.PENDING, State.PENDING, State.PENDING,
    ]  # fmt: skip
    assert (one.submissions, window.resubmitted) == (2, 3)
    fetched(window, one, 4, VIEW)
    window.take()
    assert (two.state, lost.state) == (State.FETCHED, State.PENDING)
    window.take()
    assert lost.state is State.PENDING, "both credits are in use"
    window.give_back(one)
    assert window.returned(one) == [SendRelease(TWO, 4), SendSubmit(TWO, lost)]
    assert five.state is State.PENDING


def test_room_is_made_only_for_the_first() -> None:
    window = lending(credits=1, num_daemons=2)
    window.opened(1, TWO, 2, SLOT, borrow=True)
    second, first, third = added(window, 3)
    assert [pending.daemon for pending in (second, first, third)] == [0, 1, 1]
    fetched(window, second, 1, VIEW)
    window.take()
    fetched(window, third, 3, VIEW)
    window.add([fourth := item(3)])
    assert (first.state, third.state, fourth.state) == (State.SUBMITTED, State.FETCHED, State.PENDING)
