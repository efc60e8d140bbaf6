"""The connector: which failures are retried, which end the run, and what every later session has to serve."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from scripted import SPEC, Daemon, make, wait_for
from specd.client.connect import Connector
from specd.client.conversation import Later, Waiting
from specd.client.guard import Guard
from specd.client.handshake import Session, Terms
from specd.client.interrupt import Interrupt
from specd.client.links import Link
from specd.client.seats import Role
from specd.errors import RejectedError, TransportError
from specd.transports.base import SlotRef

TERMS = Terms(name="test", spec=lambda contract: SPEC, credits=1, transport="scripted", device="cpu")


class Opening:
    """What `open_session` is in a test: it gives what the test has listed, in order, and then nothing but Later.

    ended: what became of sessions that were not wanted.
    """

    def __init__(self) -> None:
        self.outcomes: list[Exception | str] = []
        self.terms: list[Terms] = []
        self.ended: list[str] = []
        self.closing = Interrupt()
        self.up: list[tuple[Link, Session]] = []
        self.wanted = True
        self.guard = Guard(threading.Condition())
        context: Any = None
        self.connector = Connector(context, TERMS, self.opened, self.closing, self.guard)

    def __call__(self, context: object, endpoint: str, terms: Terms, waiting: Waiting) -> Any:
        self.terms.append(terms)
        if not self.outcomes:
            self.closing.set()
            raise Later("nothing is left")
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return SimpleNamespace(
            welcome=SimpleNamespace(contract=SimpleNamespace(fingerprint=outcome)),
            client=SimpleNamespace(close=lambda: self.ended.append("closed")),
            hang_up=lambda: self.ended.append("hung up"),
        )

    def opened(self, link: Link, session: Session) -> bool:
        self.up.append((link, session))
        return self.wanted

    def connect(self, *outcomes: Exception | str, role: Role | None = None) -> Link:
        """Have a session opened, and wait until it is, or never will be."""
        self.outcomes += outcomes
        link = Link("ipc://here", role or Role())
        self.connector.connect(link)
        self.connector.join()
        return link


@pytest.fixture
def opening(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opening]:
    opening = Opening()
    monkeypatch.setattr("specd.client.connect.open_session", opening)
    monkeypatch.setattr("specd.client.connect.RETRY_S", 0.0)
    yield opening
    opening.closing.set()


def test_a_daemon_that_says_later_is_asked_again_and_mentioned_once(
    opening: Opening, caplog: pytest.LogCaptureFixture
) -> None:
    link = opening.connect(Later("it is loading"), Later("it is full"), "target")
    assert len(opening.terms) == 3
    assert [up for up, _ in opening.up] == [link]
    assert link.problem == "it is full"
    assert [record.getMessage() for record in caplog.records] == ["waiting for ipc://here: it is loading"]
    opening.guard.check()


def test_how_long_a_daemon_may_be_loading_is_kept_until_it_is_not(opening: Opening) -> None:
    begin = time.monotonic()
    link = opening.connect(Later("it is loading", loading_s=1000.0))
    assert begin + 1000 <= link.loading_until <= time.monotonic() + 1000
    opening.closing.clear()
    assert opening.connect(Later("it is loading", loading_s=1000.0), Later("it is full")).loading_until == 0.0
    opening.closing.clear()
    assert opening.connect(Later("it is loading", loading_s=1000.0), "target").loading_until == 0.0


def test_a_daemon_is_left_alone_as_long_as_it_asked_for_unless_the_subscriber_closes(opening: Opening) -> None:
    begin = time.monotonic()
    opening.connect(Later("it is full", pause_s=0.2), "target")
    assert time.monotonic() - begin >= 0.2
    threading.Timer(0.1, opening.closing.set).start()
    opening.connect(Later("it is full", pause_s=60.0))
    assert time.monotonic() - begin < 30
    assert len(opening.up) == 1


@pytest.mark.parametrize("error", [TransportError("no way"), RejectedError("not these taps")])
def test_what_never_worked_ends_the_run(opening: Opening, error: Exception) -> None:
    opening.connect(error, "target")
    assert opening.guard.error is error
    assert opening.up == []


def test_a_transport_that_worked_before_is_retried_but_a_refusal_is_not(opening: Opening) -> None:
    opening.connect("target")
    opening.connect(TransportError("busy"), "target")
    assert len(opening.up) == 2
    opening.connect(RejectedError("another target"))
    assert isinstance(opening.guard.error, RejectedError)


def test_every_later_session_has_to_serve_the_first_target(opening: Opening) -> None:
    for target in ("one", "one", "one"):
        opening.connect(target)
    assert [terms.fingerprint for terms in opening.terms] == ["", "one", "one"]


def test_a_session_that_is_not_wanted_is_ended(opening: Opening) -> None:
    opening.wanted = False
    opening.connect("target")
    assert opening.ended == ["closed", "hung up"]


def test_nothing_is_opened_once_it_closes(opening: Opening) -> None:
    opening.connect()
    assert opening.closing.is_set()
    opening.connect("target")
    assert (len(opening.terms), opening.up) == (1, [])


def test_a_transport_that_worked_is_tried_again_after_a_session_was_lost(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fetches: list[SlotRef] = []

    def fail_twice(ref: SlotRef) -> None:
        fetches.append(ref)
        if len(fetches) in (2, 3):
            raise TransportError("nothing came within 10 s")

    transport = make(fail_twice)
    monkeypatch.setattr("specd.client.handshake.load", lambda name: transport)
    monkeypatch.setattr("specd.client.connect.RETRY_S", 0.001)
    with Daemon(context) as daemon, daemon.subscriber() as source:
        daemon.revoke()
        wait_for(lambda: len(fetches) == 4)
        wait_for(lambda: list(source.stats().transports.values()) == ["scripted"])
    assert "'scripted' cannot be used: nothing came within 10 s" in caplog.text
