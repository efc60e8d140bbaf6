"""Connections: the kernel's word for who is at the other end, and no mistaking one connection for another."""

from __future__ import annotations

import contextlib
import os
import socket as sockets
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from specd.daemon.connections import IDLE_S, Connection, Connections

CONNECT = """
import encodings.idna, os, socket, sys
os.setuid(int(sys.argv[2]))
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as connection:
    print("connected", flush=True)
    sys.stdin.read()
"""


class Listener:
    """A ROUTER over ipc and tcp, its connections, and a clock that only goes when told."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], directory: Path) -> None:
        self.now = 1000.0
        self.socket = context.socket(zmq.ROUTER)
        self.connections = Connections(self.socket, lambda: self.now)
        self.ipc, self.tcp = f"ipc://{directory}/s", ""
        self.socket.bind(self.ipc)
        self.socket.bind("tcp://127.0.0.1:*")
        self.tcp = self.socket.get_string(zmq.LAST_ENDPOINT)

    def hear(self) -> Connection | None:
        """The connection of the next message."""
        assert self.socket.poll(10_000)
        sender, _ = self.socket.recv_multipart(copy=False)
        return self.connections.of(sender)

    def lost(self) -> list[Connection]:
        """Those that are lost, once some are."""
        deadline = time.monotonic() + 10
        while not (ended := self.connections.ended()) and time.monotonic() < deadline:
            self.connections.monitor.poll(100)
        return self.connections.forget(ended)


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def listener(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> Iterator[Listener]:
    listener = Listener(context, tmp_path)
    yield listener
    listener.connections.close()
    listener.socket.close(linger=0)


@contextlib.contextmanager
def peer(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> Iterator[zmq.Socket[bytes]]:
    with context.socket(zmq.DEALER) as socket:
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RECONNECT_IVL, -1)
        socket.connect(endpoint)
        socket.send(b"hi")
        yield socket


def test_over_ipc_the_kernel_names_process_and_user(
    context: zmq.Context[zmq.Socket[bytes]], listener: Listener
) -> None:
    with peer(context, listener.ipc):
        connection = listener.hear()
    assert connection is not None
    assert (connection.pid, connection.owner(), connection.stranger()) == (os.getpid(), os.getuid(), None)


def test_over_loopback_the_kernel_names_the_user(context: zmq.Context[zmq.Socket[bytes]], listener: Listener) -> None:
    with peer(context, listener.tcp):
        connection = listener.hear()
        assert connection is not None
        assert (connection.pid, connection.owner(), connection.stranger()) == (0, os.getuid(), None)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
def test_another_user_is_a_stranger(listener: Listener) -> None:
    port = listener.tcp.rpartition(":")[2]
    with subprocess.Popen(
        [sys.executable, "-c", CONNECT, port, "65534"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == "connected\n"
        assert listener.connections.monitor.poll(10_000)
        listener.connections.ended()
        (connection,) = listener.connections._by_fd.values()
        assert connection.owner() == 65534
        assert f"serves user 0, and the connection is of user 65534: {'train as that user'}" in str(
            connection.stranger()
        )
        child.stdin.close()


def test_a_message_within_the_process_has_no_connection(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    socket = context.socket(zmq.ROUTER)
    connections = Connections(socket, time.monotonic)
    socket.bind("inproc://here")
    with peer(context, "inproc://here"):
        sender, _ = socket.recv_multipart(copy=False)
        assert connections.of(sender) is None
    connections.close()
    socket.close()


def test_an_end_is_told_once(context: zmq.Context[zmq.Socket[bytes]], listener: Listener) -> None:
    with peer(context, listener.ipc):
        connection = listener.hear()
        assert len(listener.connections) == 1
        assert listener.connections.ended() == 0
    assert listener.lost() == [connection]
    assert listener.connections.ended() == 0
    assert len(listener.connections) == 0


def test_the_silent_are_closed_and_the_busy_are_not(
    context: zmq.Context[zmq.Socket[bytes]], listener: Listener
) -> None:
    with contextlib.ExitStack() as stack:
        heard = []
        for endpoint in (listener.ipc, listener.tcp, listener.ipc):
            late = stack.enter_context(peer(context, endpoint))
            heard.append(listener.hear())
        busy, silent, third = heard
        assert busy is not None
        listener.now += IDLE_S - 1
        assert listener.connections.close_idle({busy}, 2) == 0
        late.send(b"again")
        assert listener.hear() is third
        listener.now += 1
        assert listener.connections.close_idle({busy}, 2) == 1
        monitor = late.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        assert listener.connections.close_idle({busy}, 0) == 1, "more than there may be"
        assert monitor.poll(10_000), "the other end learns of it"
        late.disable_monitor()
        monitor.close()
        assert len(listener.connections) == 1
    assert silent is not third


@pytest.mark.parametrize("abrupt", [True, False])
def test_a_peer_that_has_hung_up_is_nobody_s(abrupt: bool) -> None:
    """The kernel no longer says whose its end was, or shows it as root's: neither lets it in, nor ends the daemon."""
    with sockets.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        peer = sockets.create_connection(listener.getsockname())
        ours, _ = listener.accept()
        with ours:
            connection = Connection(ours.fileno(), 0.0)
            peer.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", abrupt, 0))
            peer.close()
            ours.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                assert ours.recv(1) == b""
            assert connection.owner() is None
            assert "a user that it cannot tell" in str(connection.stranger())
            connection.close()


def test_a_descriptor_that_is_no_socket_any_more_is_left_alone() -> None:
    ours, theirs = sockets.socketpair()
    with theirs:
        number = ours.fileno()
        connection = Connection(number, 0.0)
        ours.close()
        reading, writing = os.pipe()
        os.dup2(reading, number)
        before = len(os.listdir("/proc/self/fd"))
        connection.close()
        Connection(number, 0.0).close()
        assert len(os.listdir("/proc/self/fd")) == before
        for fd in {reading, writing, number}:
            os.close(fd)


def test_a_descriptor_that_is_used_again_is_another_connection() -> None:
    (ours, theirs), (other, far) = sockets.socketpair(), sockets.socketpair()
    with theirs, other, far:
        number = ours.fileno()
        connection = Connection(number, 0.0)
        ours.close()
        os.dup2(other.fileno(), number)
        connection.close()
        far.send(b"still open")
        assert other.recv(20) == b"still open"
        os.close(number)
        connection.close()
        assert connection.owner() == os.getuid(), "it was told when it came"
