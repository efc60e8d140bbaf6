"""Questions to the control loop from a process beside it, as one message each way; it answers and waits for none."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Container

from specd.errors import ProtocolError
from specd.protocol import messages as wire

ASK = b"?"
MOST_BYTES = 4 << 20


class Questions:
    """The daemon's end. fd: readable when its status is asked for. peer: the end of whoever asks, through `ask`."""

    def __init__(self) -> None:
        self._own, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._own.setblocking(False)
        self._own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_BYTES)
        self.fd = self._own.fileno()

    def answer(self, ready: Container[object], status: Callable[[], wire.StatusReport]) -> None:
        """Answer what was asked, once. ready: the readable descriptors. An answer that nobody takes is dropped."""
        if self.fd not in ready:
            return
        with contextlib.suppress(BlockingIOError):
            while True:
                self._own.recv(len(ASK))
        with contextlib.suppress(OSError):
            self._own.send(wire.encode(status()))

    def close(self) -> None:
        """Close both ends: whoever asks sees it."""
        self._own.close()
        self.peer.close()


def ask(peer: socket.socket, timeout_s: float) -> wire.StatusReport:
    """The daemon's status. Raises TimeoutError where it does not answer in time, EOFError where it is gone."""
    peer.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while peer.recv(MOST_BYTES):  # the answer to a question that was given up
            pass
    peer.settimeout(timeout_s)
    try:
        peer.send(ASK)
        frame = peer.recv(MOST_BYTES)
    except TimeoutError:
        raise TimeoutError(f"the daemon's control did not answer within {timeout_s:g} s") from None
    except (BrokenPipeError, ConnectionResetError):
        frame = b""
    if not frame:
        raise EOFError("the daemon is gone")
    report = wire.decode_reply(frame)
    if not isinstance(report, wire.StatusReport):
        raise ProtocolError(f"control answered with {type(report).__name__}, expected StatusReport")
    return report
