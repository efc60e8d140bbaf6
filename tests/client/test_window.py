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
from specd.transports.base import SlotRef
from windows import Item, Token, item, make, ready

ONE, TWO, AGAIN = Token("one"), Token("two"), Token("again")
BUFFER, VIEW = Token("buffer"), Token("view")


def added(window: Window[Token, Token], count: int) -> list[Item]:
    """Batches that were submitted, as far as there is room."""
    batches = [item(index) for index in range(count)]
    window.add(batches)
    return batches


def fetched(window: Window[Token, Token], pending: Item, lease: int, buffer: Token = BUFFER) -> None:
    """A batch that was submitted is captured and transferred."""
    assert pending.daemon is not None
    session = window._daemons[pending.daemon].session
    assert session is not None
    window.ready(session, ready(pending, lease))
    assert window.begin(pending, session) == SlotRef(lease, 1, pending.layout.nbytes)
    window.fetched(pending, buffer, 0.5)
    assert pending.state is State.FETCHED


def lending(credits: int, num_daemons: int = 1, max_attempts: int = 3) -> Window[Token, Token]:
    """A window with a session whose slots are borrowed."""
    window = make(num_daemons, max_attempts)
    window.opened(0, ONE, credits, borrow=True, announce=True)
    return window


def test_one_batch_from_add_to_give_back() -> None:
    window = make()
    assert window.opened(0, ONE, 2) == []
    pending = item(7)
    assert window.add([pending]) == [SendSubmit(ONE, pending)]
    assert (pending.seq, pending.attempts, pending.state, window.here()) == (1, 1, State.SUBMITTED, False)
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


def test_who_needs_recv_ready_is_told_before_the_transfer() -> None:
    window = make()
    window.opened(0, ONE, 1, announce=True)
    (pending,) = added(window, 1)
    assert window.ready(ONE, ready(pending, 5)) == [SendRecvReady(ONE, 5), FetchSlot(ONE, pending)]


def test_batches_go_in_order_to_the_daemon_with_most_room() -> None:
    window = make(3)
    window.opened(0, ONE, 2)
    window.opened(2, TWO, 3)
    batches = [item(index) for index in range(7)]
    order = [TWO, ONE, TWO, ONE, TWO]  # with as much room, the first of the endpoints
    assert window.add(batches) == [SendSubmit(session, batches[i]) for i, session in enumerate(order)]
    assert [pending.state for pending in batches[5:]] == [State.PENDING] * 2
    fetched(window, batches[1], 9)
    assert batches[5].state is State.SUBMITTED
    assert window.opened(1, AGAIN, 8) == [SendSubmit(AGAIN, batches[6])]


def test_nothing_is_taken_out_of_order() -> None:
    window = make()
    window.opened(0, ONE, 2)
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
    window.opened(0, ONE, 3)
    here, on_the_way, asked = added(window, 3)
    fetched(window, here, 1)
    window.ready(ONE, ready(on_the_way, 2))
    window.opened(1, TWO, 1)
    assert window.lost(ONE, "it died") == [SendSubmit(TWO, on_the_way)]
    assert window.lost(ONE, "it died") == []
    assert [pending.state for pending in (here, on_the_way, asked)] == [State.FETCHED, State.SUBMITTED, State.PENDING]
    assert (window.resubmitted, on_the_way.attempts, asked.attempts) == (2, 2, 1)
    assert window.begin(on_the_way, ONE) is None, "its transfer was asked for, but it is another's now"
    assert window.ready(ONE, ready(asked, 3)) == [], "late"
    assert window.failed(ONE, asked.seq, "late") == []
    assert window.opened(0, AGAIN, 1) == [SendSubmit(AGAIN, asked)]
    assert window.ready(TWO, ready(on_the_way, 4)) == [FetchSlot(TWO, on_the_way)]
    assert window.begin(on_the_way, ONE) is None
    assert window.begin(on_the_way, TWO) is not None
    assert window.begin(on_the_way, TWO) is None, "it has begun"


def test_a_transfer_in_flight_decides_for_itself_when_its_session_is_lost() -> None:
    window = make()
    window.opened(0, ONE, 2)
    one, two = added(window, 2)
    for lease, pending in enumerate((one, two)):
        window.ready(ONE, ready(pending, lease))
        assert window.begin(pending, ONE) is not None
    assert window.lost(ONE, "it died") == []
    assert window.resubmitted == 0
    assert window.opened(0, AGAIN, 3) == []
    assert window.fetched(one, BUFFER, 0.0) == [], "there is no lease to release"
    assert one.state is State.FETCHED
    assert window.missed(two, "stale", 0.0, lost=True) == [Missed(ONE, two, "stale"), SendSubmit(AGAIN, two)]
    assert window.resubmitted == 1


def test_a_lost_sessions_transfer_takes_a_credit_of_the_next_one_until_it_ends() -> None:
    window = make()
    window.opened(0, ONE, 1)
    one, two = added(window, 2)
    window.ready(ONE, ready(one, 1))
    window.begin(one, ONE)
    window.lost(ONE, "it died")
    assert window.opened(0, AGAIN, 1) == []
    assert window.fetched(one, BUFFER, 0.0) == [SendSubmit(AGAIN, two)]


def test_a_transfer_that_fails_is_tried_again_up_to_max_attempts() -> None:
    window = make(max_attempts=2)
    window.opened(0, ONE, 1)
    (pending,) = added(window, 1)
    for lease, then in ((1, [SendSubmit(ONE, pending)]), (2, [])):
        window.ready(ONE, ready(pending, lease))
        window.begin(pending, ONE)
        found = window.missed(pending, "another generation", 0.0, lost=False)
        assert found == [Missed(ONE, pending, "another generation"), SendRelease(ONE, lease), *then]
    assert (pending.attempts, window.resubmitted) == (2, 1)
    with pytest.raises(BatchError, match=r"batch 0 .*failed 2 times \(subscriber.max_attempts\): another generation"):
        window.here()


def test_a_lost_transport_is_hung_up_and_what_was_in_flight_over_it_is_retried() -> None:
    window = make()
    window.opened(0, ONE, 3, announce=True)
    batches = one, two, three = added(window, 3)
    for lease, pending in enumerate((one, two)):
        window.ready(ONE, ready(pending, lease))
    window.begin(one, ONE)
    assert window.missed(one, "aborted", 0.0, lost=True) == [Abandon(ONE, "aborted"), Missed(ONE, one, "aborted")]
    assert window.begin(two, ONE) is None
    assert window.lost(ONE, "aborted") == [], "it is already"
    assert {pending.state for pending in batches} == {State.PENDING}
    assert window.opened(0, AGAIN, 3) == [SendSubmit(AGAIN, pending) for pending in batches]
    assert window.resubmitted == 3
    assert three.attempts == 2


def test_what_cannot_be_captured_is_named_when_its_turn_comes() -> None:
    window = make()
    window.opened(0, ONE, 2)
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
    window.opened(0, ONE, 2)
    window.opened(1, TWO, 1)
    one, two, three = added(window, 3)
    assert [pending.daemon for pending in (one, two, three)] == [0, 0, 1]
    message = ready(one, 1)
    for session, wrong, match in (
        (ONE, msgspec.structs.replace(message, seq=99), "daemon-0 announced seq 99, which was not asked for"),
        (TWO, message, "daemon-1 announced seq 1, which was not asked for"),
        (ONE, msgspec.structs.replace(message, batch_id=b"x" * 16), f"announced batch 0 .* as id {(b'x' * 16).hex()}"),
        (ONE, msgspec.structs.replace(message, layout=Layout(tensors=(), nbytes=4)), "announced batch 0 .* nbytes=4"),
    ):
        with pytest.raises(ProtocolError, match=match):
            window.ready(session, wrong)
    assert window.ready(ONE, message) == [FetchSlot(ONE, one)]
    with pytest.raises(ProtocolError, match="daemon-0 announced seq 1, which was not asked for"):
        window.ready(ONE, message)


@pytest.mark.parametrize("announce", [False, True])
def test_dropped_batches_are_given_up_as_soon_as_they_can_be(announce: bool) -> None:
    window = make()
    window.opened(0, ONE, 4, announce=announce)
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
    assert window.opened(0, AGAIN, 9) == []
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
    assert window.opened(0, AGAIN, 4, borrow=True) == [SendSubmit(AGAIN, pending) for pending in batches[1:]]
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
    assert window.opened(0, AGAIN, 1) == []
    assert pending.state is State.OVER


def test_the_last_borrowed_batch_makes_room_for_the_first_and_nothing_counts_as_failed() -> None:
    window = lending(credits=3, num_daemons=2, max_attempts=2)
    window.opened(1, TWO, 2, borrow=True)
    one, lost, three, four, five = batches = added(window, 5)
    assert [pending.daemon for pending in batches] == [0, 0, 1, 0, 1]
    for lease, pending in enumerate((one, three, five), 1):
        fetched(window, pending, lease, VIEW)
    assert window.lost(ONE, "it died") == [Unborrow(ONE), Unborrow(TWO), SendRelease(TWO, 3), SendSubmit(TWO, one)]
    assert [pending.state for pending in batches] == [
        State.SUBMITTED, State.PENDING, State.FETCHED, State.PENDING, State.PENDING,
    ]  # fmt: skip
    assert (five.attempts, one.attempts, window.resubmitted) == (0, 2, 3)
    fetched(window, one, 4, VIEW)
    assert window.take() == [Unborrow(TWO), SendRelease(TWO, 2), SendSubmit(TWO, lost)], "it is the first now"
    assert three.attempts == 0
    assert four.state is State.PENDING


def test_room_is_made_only_for_the_first() -> None:
    window = lending(credits=1, num_daemons=2)
    window.opened(1, TWO, 2, borrow=True)
    first, second, third = added(window, 3)
    assert [pending.daemon for pending in (first, second, third)] == [1, 0, 1]
    fetched(window, third, 3, VIEW)
    assert window.lost(ONE, "it died") == []
    assert (second.state, third.state) == (State.PENDING, State.FETCHED)
