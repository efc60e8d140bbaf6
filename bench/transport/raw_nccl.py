"""The ceiling of nccl: ncclSend and ncclRecv in a loop between two processes, with the transport's own settings."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Final, Literal

import msgspec

from specd.errors import TransportError
from specd.transports.nccl.communicator import Communicator, Library, library
from specd.transports.nccl.transport import MAX_CTAS
from specd.transports.nccl.watch import BYTES_S, EAGER_S, Watch
from specd.transports.testing.spawned import no_working_directory

CONNECT_S: Final = 60.0
"""Covers the other process's start."""
STEP_S: Final = 20.0
SENDER: Final = 0
RECEIVER: Final = 1


class _Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the receiver asks of the sender: `count` sends of `nbytes`, as soon as it can."""

    nbytes: int
    count: int


class _Connecting(Watch):
    """Ends early when the other process has ended."""

    __slots__ = ("_peer_lives",)

    def __init__(self, peer_lives: Callable[[], bool]) -> None:
        super().__init__(CONNECT_S, threading.Event())
        self._peer_lives = peer_lives

    def until(self, done: Callable[[], bool], what: str, eager_s: float = EAGER_S) -> None:
        def over() -> bool:
            if not self._peer_lives():
                raise TransportError("the other process of the raw NCCL loop ended; what it wrote to stderr says why")
            return done()

        super().until(over, what, eager_s)


class RawRank:
    """One end of a communicator of the transport's kind; nothing but sends, receives and waits. One thread at a time.

    Waits as the transport does. Raises TransportError when the peer does not come or a step takes too long.
    """

    def __init__(
        self,
        nccl: Library,
        device: str,
        rank: int,
        unique_id: bytes,
        nbytes: int,
        count: int,
        peer_lives: Callable[[], bool],
    ) -> None:
        import torch

        self._nccl = nccl
        with nccl.translated(), torch.cuda.device(device):
            self._buffers = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(count)]
            torch.cuda.synchronize(device)  # the communicator's stream waits for no other
        self._communicator = Communicator(nccl, device, rank, unique_id, MAX_CTAS, _Connecting(peer_lives))

    def send(self, nbytes: int, count: int) -> None:
        """Enqueue `count` sends, then wait for the last."""
        self._run("send", nbytes, count)

    def receive(self, nbytes: int, count: int) -> None:
        """Enqueue `count` receives, then wait for the last."""
        self._run("recv", nbytes, count)

    def abort(self) -> None:
        """End it. An abort that hangs is left behind."""
        self._communicator.abort(self._buffers)

    def _run(self, method: Literal["send", "recv"], nbytes: int, count: int) -> None:
        watch, side = Watch(STEP_S, threading.Event()), self._communicator.side
        with self._nccl.translated(), side.current():
            for index in range(count):
                self._communicator.call(method, watch, self._buffers[index % len(self._buffers)][:nbytes])
            watch.until(side.mark(), "the raw NCCL loop", EAGER_S + nbytes * count / BYTES_S)
            if not self._communicator.settled():
                raise TransportError("the raw NCCL loop ended with a call in flight")


class NcclLoop:
    """Receives on the trainer's GPU what a process of its own sends from the daemon's, without any other message.

    The timed receives follow one that is not timed, so that both sides are in their loop.
    """

    kind = "ncclSend/Recv"

    def __init__(self, daemon: str, trainer: str, nbytes: int, count: int) -> None:
        import torch

        found = library()
        with found.translated(), torch.cuda.device(trainer):
            unique_id = bytes(found.core.get_unique_id())
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_sender, args=(theirs, daemon, unique_id, nbytes, count), name="specd-raw-nccl", daemon=True
        )
        with no_working_directory():
            self._process.start()
        theirs.close()
        self._rank: RawRank | None = None
        try:
            self._rank = RawRank(found, trainer, RECEIVER, unique_id, nbytes, count, self._process.is_alive)
            self.one(1)  # the first message sets up the connection
        except BaseException:
            self.close()
            raise

    def one(self, nbytes: int) -> float:
        return self.stream(nbytes, 1)

    def stream(self, nbytes: int, count: int) -> float:
        assert self._rank is not None
        try:
            self._pipe.send_bytes(msgspec.msgpack.encode(_Order(nbytes=nbytes, count=count + 1)))
        except OSError:
            raise TransportError("the sender of the raw NCCL loop is gone; what it wrote to stderr says why") from None
        self._rank.receive(nbytes, 1)
        begin = time.perf_counter()
        self._rank.receive(nbytes, count)
        return time.perf_counter() - begin

    def close(self) -> None:
        if self._pipe.closed:
            return
        self._pipe.close()
        if self._rank is not None:
            self._rank.abort()
        self._process.join(15)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _sender(pipe: Connection, device: str, unique_id: bytes, nbytes: int, count: int) -> None:
    """The child: sends as ordered until the pipe closes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    rank = RawRank(library(), device, SENDER, unique_id, nbytes, count, parent.is_alive)
    with contextlib.suppress(EOFError, OSError, TransportError):
        while True:
            order = msgspec.msgpack.decode(pipe.recv_bytes(), type=_Order)
            rank.send(order.nbytes, order.count)
    rank.abort()
