"""A conversation: what is told while a daemon does not answer, and how each wait ends."""

from __future__ import annotations

import socket as sockets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from scripted import wait_for
from slow_link import SlowLink
from specd.client import conversation
from specd.client.conversation import Conversation, Later, Waiting
from specd.client.interrupt import Interrupt
from specd.errors import ConfigError, ProtocolError
from specd.protocol import messages as wire

Open = Callable[[str], Conversation]
EPOCH = b"e" * 16


class Told(list[str]):
    """What was told, and the event that ends all waits."""

    closing = Interrupt()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr(conversation, "FIRST_S", 0.1)
    monkeypatch.setattr(conversation, "STEP_S", 1.0)
    found = Told()
    found.closing = Interrupt()
    return found


@pytest.fixture
def talk(context: zmq.Context[zmq.Socket[bytes]], told: Told) -> Iterator[Open]:
    opened: list[Conversation] = []

    def open_(endpoint: str) -> Conversation:
        waiting = Waiting(told.closing, lambda reason: told.append(str(reason)))
        opened.append(Conversation(context, endpoint, waiting))
        return opened[-1]

    yield open_
    for each in opened:
        each.release().close(linger=0)


@pytest.fixture
def daemon(context: zmq.Context[zmq.Socket[bytes]]) -> Iterator[zmq.Socket[bytes]]:
    """A daemon's socket, which nobody reads."""
    with context.socket(zmq.ROUTER) as socket:
        socket.set(zmq.LINGER, 0)
        socket.bind("tcp://127.0.0.1:*")
        yield socket


def where(daemon: zmq.Socket[bytes]) -> str:
    return str(daemon.getsockopt_string(zmq.LAST_ENDPOINT)).rstrip("\0")


def free_port() -> int:
    with sockets.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("scheme", ["ipc", "tcp"])
def test_where_nobody_listens_is_told_at_once_and_waited_for(
    scheme: str, tmp_path: Path, context: zmq.Context[zmq.Socket[bytes]], talk: Open, told: Told
) -> None:
    endpoint = f"ipc://{tmp_path}/none.sock" if scheme == "ipc" else f"tcp://127.0.0.1:{free_port()}"
    begin = time.monotonic()
    with pytest.raises(Later, match=f"nobody listens at {endpoint}"):
        talk(endpoint).reach()
    assert 1.0 <= time.monotonic() - begin < 5.0
    assert set(told) == {f"nobody listens at {endpoint}"}
    told.clear()

    def come(reason: object) -> None:
        if len(told) == 0:
            late.bind(endpoint)
        told.append(str(reason))

    with context.socket(zmq.ROUTER) as late:
        late.set(zmq.LINGER, 0)
        coming = Conversation(context, endpoint, Waiting(told.closing, come))
        coming.reach()
        coming.release().close(linger=0)


def test_a_peer_that_does_not_greet_is_told_of_in_ever_longer_steps(talk: Open, told: Told) -> None:
    with sockets.create_server(("127.0.0.1", 0)) as dumb:  # its kernel accepts, as that of a stopped daemon does
        endpoint = f"tcp://127.0.0.1:{dumb.getsockname()[1]}"
        with pytest.raises(Later, match="within 1 s"):
            talk(endpoint).reach()
    assert told == [f"no answer from {endpoint} within {seconds} s" for seconds in ("0.1", "0.2", "0.4", "0.8")]


def test_a_daemon_that_is_busy_is_waited_for(daemon: zmq.Socket[bytes], talk: Open, told: Told) -> None:
    one = talk(where(daemon))
    one.reach()

    def answer() -> None:
        key, _ = daemon.recv_multipart()
        wait_for(lambda: len(told) == 3)
        daemon.send_multipart([key, wire.encode(wire.Renewed(epoch=EPOCH))])

    busy = threading.Thread(target=answer)
    busy.start()
    assert one.ask(wire.Renew(epoch=EPOCH), wire.Renewed).epoch == EPOCH
    busy.join()
    assert told[2].endswith("within 0.4 s")


def test_a_long_way_does_not_begin_anew(
    daemon: zmq.Socket[bytes], talk: Open, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the messages that two sockets greet each other with takes longer than it takes to tell of it."""
    monkeypatch.setattr(conversation, "STEP_S", 5.0)
    with SlowLink(rtt_s=0.3) as link:
        talk(link.through(where(daemon))).reach()
        assert link.accepted == 1
    assert len(told) >= 2


def test_an_endpoint_that_is_none_leaves_nothing_behind(talk: Open) -> None:
    with pytest.raises(ConfigError, match="expected ipc://PATH or tcp://HOST:PORT"):
        talk("tcp://127.0.0.1:*")


def test_a_connection_that_is_lost_is_not_waited_for(daemon: zmq.Socket[bytes], talk: Open, told: Told) -> None:
    one = talk(where(daemon))
    one.reach()
    daemon.close()
    with pytest.raises(Later, match="is gone") as gone:
        one.hear()
    assert gone.value.pause_s > 0
    assert told == []


@pytest.mark.parametrize("connected", [False, True])
def test_a_wait_ends_when_the_subscriber_closes(
    connected: bool, daemon: zmq.Socket[bytes], talk: Open, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "STEP_S", 60.0)
    monkeypatch.setattr(conversation, "FIRST_S", 60.0)
    with sockets.create_server(("127.0.0.1", 0)) as dumb:
        one = talk(where(daemon) if connected else f"tcp://127.0.0.1:{dumb.getsockname()[1]}")
        if connected:
            one.reach()
        threading.Timer(0.1, told.closing.set).start()
        begin = time.monotonic()
        with told.closing.calling(one.cancel), pytest.raises(Later, match="the subscriber is closed"):
            (one.hear if connected else one.reach)()
        assert time.monotonic() - begin < 2.0


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        (wire.Revoke(epoch=EPOCH, reason="the worker died"), Later, "the worker died"),
        (wire.Error(epoch=EPOCH, reason="what?"), ProtocolError, "answered Renew with Error: what?"),
    ],
)
def test_another_answer_than_asked_for_is_an_error(
    answer: wire.Message, error: type[Exception], says: str, daemon: zmq.Socket[bytes], talk: Open
) -> None:
    one = talk(where(daemon))
    one.say(wire.Renew(epoch=EPOCH))
    key, _ = daemon.recv_multipart()
    daemon.send_multipart([key, wire.encode(answer)])
    with pytest.raises(error, match=says.replace("?", r"\?")):
        one.ask(wire.Renew(epoch=EPOCH), wire.Renewed)
