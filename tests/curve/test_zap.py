"""The answer to libzmq's question about each peer: yes for a key that is let in, and no for whatever else is asked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zmq
import zmq.utils.monitor
from zmq.utils import z85

from specd.curve import keys, zap

SERVER, ALICE = keys.draw(), keys.draw()
Context = zmq.Context[zmq.Socket[bytes]]


@pytest.fixture
def context() -> Iterator[Context]:
    with zmq.Context() as context:
        yield context


def question(key: bytes = z85.decode(ALICE.public.encode()), **changed: bytes) -> list[bytes]:
    fields = {
        "version": b"1.0", "request": b"7", "domain": b"specd", "address": b"127.0.0.1", "identity": b"",
        "mechanism": b"CURVE", "key": key,
    } | changed  # fmt: skip
    return list(fields.values())


def answer(context: Context, frames: list[bytes]) -> list[bytes]:
    handler = zap.Zap(context, lambda public: public == ALICE.public)
    with context.socket(zmq.REQ) as asker:
        asker.connect(zap.ENDPOINT)
        asker.send_multipart(frames)
        assert handler.socket.poll(10_000)
        handler.handle()
        assert asker.poll(10_000)
        reply = asker.recv_multipart()
    handler.close()
    return reply


def test_a_key_that_is_let_in_is_the_user_id(context: Context) -> None:
    assert answer(context, question()) == [b"1.0", b"7", b"200", b"OK", ALICE.public.encode(), b""]


@pytest.mark.parametrize(
    "frames",
    [
        question(z85.decode(SERVER.public.encode())),
        question(b"short"),
        question(mechanism=b"NULL"),
        question(version=b"2.0"),
        question()[:6],
        [*question(), b"more"],
        [b""],
    ],
    ids=["stranger", "short", "null", "version", "few", "many", "nothing"],
)
def test_whatever_else_is_asked_gets_a_no(context: Context, frames: list[bytes]) -> None:
    reply = answer(context, frames)
    assert (reply[2], reply[4]) == (b"400", b"")
    assert len(reply) == 6


def test_without_a_handler_nobody_comes_in(context: Context) -> None:
    """libzmq's default is to let everybody in."""
    with context.socket(zmq.ROUTER) as daemon, zmq.Context() as other, other.socket(zmq.DEALER) as peer:
        zap.guard(daemon, SERVER)
        daemon.bind("tcp://127.0.0.1:*")
        peer.set(zmq.LINGER, 0)
        zap.prove(peer, ALICE, SERVER.public)
        monitor = peer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        peer.connect(daemon.get_string(zmq.LAST_ENDPOINT))
        assert monitor.poll(10_000)
        assert zmq.utils.monitor.recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED
        peer.disable_monitor()
        monitor.close()


def test_an_endpoint_bound_before_asks_for_no_key(context: Context) -> None:
    with context.socket(zmq.ROUTER) as daemon, context.socket(zmq.DEALER) as inside:
        daemon.bind("inproc://before")
        zap.guard(daemon, SERVER)
        inside.connect("inproc://before")
        inside.send(b"hello")
        assert daemon.poll(10_000)
        sender, frame = daemon.recv_multipart(copy=False)
        assert (frame.bytes, zap.user_of(sender)) == (b"hello", "")
