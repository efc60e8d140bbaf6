"""The I/O loop alone: what is sent in which order, what is handed on, and how it finds out that a session is lost."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from scripted import EXPECT_S, Daemon
from specd.client.guard import Guard
from specd.client.handshake import Session
from specd.client.io import GONE, Closed, Lost, SocketLoop
from specd.client.links import Link, Links
from specd.errors import ProtocolError
from specd.protocol import messages as wire


class Owner:
    """A loop over the sessions of `open`, whose events it keeps; it hangs up what is over."""

    def __init__(self, *endpoints: str) -> None:
        self.lock = threading.Condition()
        self.guard = Guard(self.lock)
        self.links = Links(endpoints)
        self.events: queue.SimpleQueue[tuple[Link, Any]] = queue.SimpleQueue()
        self.loop = SocketLoop(self.links, self.lock, self._act, self.guard)

    def open(self, session: Session) -> Link:
        (link,) = [link for link in self.links if link.endpoint == session.endpoint]
        with self.lock:
            link.open(session)
        self.loop.wake()
        return link

    def post(self, session: Session, *messages: wire.Message) -> None:
        with self.lock:
            for message in messages:
                self.loop.post(session, message)

    def event(self) -> tuple[Link, Any]:
        """The next that is not the answer to RENEW."""
        while True:
            link, event = self.events.get(timeout=EXPECT_S)
            if not isinstance(event, wire.Renewed):
                return link, event

    def _act(self, link: Link, event: Any) -> None:
        assert threading.current_thread().name == "specd-io"
        assert link.session is not None
        if isinstance(event, wire.Failed):
            raise ProtocolError(event.reason)
        if isinstance(event, Lost | Closed | wire.Revoke):
            link.hang_up(event.reason).client.close()
        self.events.put((link, event))


@pytest.fixture
def daemon(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[Daemon]:
    with Daemon(context) as daemon:
        yield daemon


@pytest.fixture
def owner(daemon: Daemon) -> Iterator[Owner]:
    owner = Owner(daemon.endpoint)
    yield owner
    owner.loop.close()


@pytest.fixture
def session(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Session:
    return daemon.session(monkeypatch)


def release(session: Session, lease: int) -> wire.Release:
    return wire.Release(epoch=session.epoch, lease=lease)


def test_messages_are_sent_in_order_and_answers_are_handed_on(daemon: Daemon, owner: Owner, session: Session) -> None:
    link = owner.open(session)
    owner.post(session, *(release(session, lease) for lease in range(50)))
    assert [daemon.expect(wire.Release)[1].lease for _ in range(50)] == list(range(50))
    answered, event = owner.events.get(timeout=EXPECT_S)
    assert answered is link
    assert isinstance(event, wire.Renewed), "it renews the session by itself"
    with owner.lock:
        assert link.renew_at > link.heard


def test_flush_sends_at_once_what_was_posted_before(daemon: Daemon, owner: Owner, session: Session) -> None:
    """Done by this thread in place of the loop's, which the lock holds off."""
    owner.open(session)
    with owner.lock:
        owner.loop.post(session, release(session, 1))
        owner.loop.post(session, release(session, 2))
        assert owner.loop.flush() == []
        assert [daemon.expect(wire.Release)[1].lease for _ in range(2)] == [1, 2]


def test_what_is_posted_in_a_session_that_is_over_is_not_sent(
    daemon: Daemon, owner: Owner, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner.open(session)
    daemon.revoke()
    assert isinstance(owner.event()[1], wire.Revoke)
    daemon.expect(wire.Bye)
    again = daemon.session(monkeypatch)
    owner.open(again)
    owner.post(session, release(session, 1))
    owner.post(again, release(again, 2))
    assert daemon.expect(wire.Release)[1].lease == 2


def test_a_daemon_that_does_not_answer_for_half_a_ttl_is_lost(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Daemon(context, ttl_s=0.2) as silent:
        owner = Owner(silent.endpoint)
        session = silent.session(monkeypatch)
        silent.deaf = True
        link = owner.open(session)
        lost, event = owner.event()
        assert lost is link
        assert isinstance(event, Lost)
        assert event.reason == link.problem
        assert event.reason.startswith("it has not answered for ")
        owner.loop.close()


def test_a_session_whose_transport_is_lost_is_lost(owner: Owner, session: Session) -> None:
    link = owner.open(session)
    with owner.lock:
        owner.loop.abandon(session, "aborted")
    assert owner.event() == (link, Lost("aborted"))
    with owner.lock:
        owner.loop.abandon(session, "it is over already")
    assert link.broken == "aborted"


def test_a_daemon_that_ended_in_the_same_process_is_lost(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Daemon(context) as ended:
        owner = Owner(ended.endpoint)
        session = ended.session(monkeypatch)
        link = owner.open(session)
        owner.post(session, release(session, 1))
        ended.expect(wire.Release)
    owner.post(session, release(session, 2))
    assert owner.event() == (link, Lost(GONE))
    owner.loop.close()


def test_stopping_sends_what_was_posted_and_ends_every_session(daemon: Daemon, owner: Owner, session: Session) -> None:
    link = owner.open(session)
    with owner.lock:
        owner.loop.post(session, release(session, 7))
    owner.loop.stop()
    assert owner.event() == (link, Closed("the subscriber is closed"))
    assert daemon.expect(wire.Release)[1].lease == 7
    daemon.expect(wire.Bye)


def test_what_cannot_be_acted_on_ends_the_loop_and_its_sessions(daemon: Daemon, owner: Owner, session: Session) -> None:
    owner.open(session)
    owner.post(session, release(session, 1))
    key, _ = daemon.expect(wire.Release)
    daemon.say(key, wire.Failed(epoch=daemon.epoch, seq=1, batch_id=bytes(16), reason="nonsense", retry=False))
    assert isinstance(owner.event()[1], Closed)
    daemon.expect(wire.Bye)
    owner.loop.stop()
    with pytest.raises(ProtocolError, match="nonsense"):
        owner.guard.check()
