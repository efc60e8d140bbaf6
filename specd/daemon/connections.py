"""Connections: who is at the other end of the daemon's socket, as the kernel tells, and how long it has been silent.

libzmq reports every connection's file descriptor when it accepts it, and with every message that came over it. A
descriptor number is used again once its connection is closed; the kernel's cookie of a socket is not.
"""

from __future__ import annotations

import contextlib
import os
import socket as sockets
import struct
from collections.abc import Callable, Collection, Iterator
from ipaddress import ip_address
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

SO_COOKIE = 57
ESTABLISHED = "01"
"""As /proc/net/tcp has it."""
IDLE_S = 60.0
"""A connection without a session is closed when it has said nothing for so long."""
_CREDENTIALS = struct.Struct("3i")


class Connection:
    """One accepted connection. pid, uid: of the process at the other end over ipc; 0 and None over tcp.

    heard: when it last said something, in the clock's seconds. user: the public key that it proved, and name: whose it
    is, both empty without keys, or before it said something.
    """

    __slots__ = ("_cookie", "fd", "heard", "name", "pid", "uid", "user")

    def __init__(self, fd: int, now: float) -> None:
        self.fd = fd
        self.heard = now
        self.pid = 0
        self.uid: int | None = None
        self.user = self.name = ""
        self._cookie = b""
        with contextlib.suppress(OSError), _duplicate(fd) as socket:  # it may be closed already
            self._cookie = _cookie(socket)
            if socket.family == sockets.AF_UNIX:
                credentials = socket.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, _CREDENTIALS.size)
                self.pid, self.uid, _ = _CREDENTIALS.unpack(credentials)

    def owner(self) -> int | None:
        """The user at the other end, if that is on this host; over tcp, as the kernel's table of sockets has it.

        None when it cannot be told, as of a connection that is closed.
        """
        if self.uid is None:
            with contextlib.suppress(OSError), _duplicate(self.fd) as socket:
                if _cookie(socket) == self._cookie:
                    self.uid = _tcp_owner(socket.getpeername(), socket.getsockname())
        return self.uid

    def stranger(self) -> str | None:
        """Why whoever is at the other end is not let in by a daemon that serves its own user, or None."""
        own, owner = os.getuid(), self.owner()
        if owner in (own, 0):
            return None
        whose = "a user that it cannot tell" if owner is None else f"user {owner}"
        return (
            f"the daemon serves user {own}, and the connection is of {whose}: train as that user, or start the daemon "
            f"with --insecure to let every user of its host in"
        )

    def close(self) -> None:
        """End the connection, unless it is closed; libzmq then cleans up after it."""
        with contextlib.suppress(OSError), _duplicate(self.fd) as socket:  # the other end may be faster
            if _cookie(socket) == self._cookie:
                socket.shutdown(sockets.SHUT_RDWR)


class Connections:
    """All connections of a socket that listens. monitor: to be polled; readable when one came or went.

    clock: monotonic seconds. Close it before the socket.
    """

    def __init__(self, socket: zmq.Socket[bytes], clock: Callable[[], float]) -> None:
        self._socket = socket
        self._clock = clock
        self.monitor = socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._by_fd: dict[int, Connection] = {}
        self._ended: list[Connection] = []
        """What of theirs was not read yet is still theirs."""

    def __len__(self) -> int:
        return len(self._by_fd)

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._by_fd.values()))

    def of(self, frame: zmq.Frame) -> Connection | None:
        """The connection of a frame, which has said something now; None over inproc, or if it was closed."""
        try:
            fd = frame.get(zmq.SRCFD)
        except zmq.ZMQError:
            return None
        self._listen()  # it may have been accepted a moment ago, in place of one that ended
        connection = self._by_fd.get(fd)
        if connection is not None:
            connection.heard = self._clock()
        return connection

    def ended(self) -> int:
        """How many ended, and are not forgotten."""
        self._listen()
        return len(self._ended)

    def forget(self, count: int) -> list[Connection]:
        """Forget the first `count` that ended, once all that they said is read; returns them."""
        gone, self._ended = self._ended[:count], self._ended[count:]
        for connection in gone:
            if self._by_fd.get(connection.fd) is connection:
                del self._by_fd[connection.fd]
        return gone

    def close_idle(self, busy: Collection[Connection], most: int) -> int:
        """Close those, apart from `busy`, that are silent for IDLE_S, and the longest silent of more than `most`.

        Returns how many.
        """
        idle = sorted((each for each in self._by_fd.values() if each not in busy), key=lambda each: each.heard)
        late = self._clock() - IDLE_S
        closed = [each for place, each in enumerate(idle) if each.heard <= late or place < len(idle) - most]
        for connection in closed:
            connection.close()
            del self._by_fd[connection.fd]
        return len(closed)

    def close(self) -> None:
        """Stop watching."""
        self._socket.disable_monitor()
        self.monitor.close(linger=0)

    def _listen(self) -> None:
        """Take note of what came and went."""
        while int(self.monitor.get(zmq.EVENTS)) & zmq.POLLIN:
            event = recv_monitor_message(self.monitor)
            fd = event["value"]
            if (before := self._by_fd.get(fd)) is not None and before not in self._ended:
                self._ended.append(before)
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._by_fd[fd] = Connection(fd, self._clock())


def _duplicate(fd: int) -> sockets.socket:
    """A descriptor of our own for a socket of libzmq's. Raises OSError if there is none."""
    own = os.dup(fd)
    try:
        return sockets.socket(fileno=own)
    except OSError:  # the number is another file's by now
        os.close(own)
        raise


def _cookie(socket: sockets.socket) -> bytes:
    """What tells a socket from every other one that this kernel ever had."""
    return socket.getsockopt(sockets.SOL_SOCKET, SO_COOKIE, 8)


def _tcp_owner(peer: tuple[str, int], own: tuple[str, int]) -> int | None:
    """The user of a local process that holds the other end of a tcp connection. peer, own: address and port.

    None unless that end is established: the kernel shows what no process holds any more as root's.
    """
    ends = [_in_table(*end[:2]) for end in (peer, own)]
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text("ascii").splitlines()[1:]:
                fields = line.split()
                if fields[1:4] == [*ends, ESTABLISHED]:
                    return int(fields[7])
    return None


def _in_table(host: str, port: int) -> str:
    """An address and a port as /proc/net/tcp writes them: 32-bit words in the machine's order."""
    packed = ip_address(host).packed
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"
