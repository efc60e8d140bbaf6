"""The ceiling of nccl: ncclSend and ncclRecv in a loop between two processes, with the transport's own settings."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Final

import msgspec

from specd.errors import TransportError
from specd.transports.nccl import MAX_CTAS
from specd.transports.nccl_comm import Library, Watch, library

CONNECT_S: Final = 60.0
"""Covers the other process's start."""
STEP_S: Final = 20.0
ABORT_S: Final = 10.0
SUCCESS: Final = 0
IN_PROGRESS: Final = 7
SENDER: Final = 0
RECEIVER: Final = 1


class _Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the receiver asks of the sender: so many sends, as soon as it can."""

    nbytes: int
    count: int


class Link:
    """One end of a communicator of its own; nothing but sends, receives and waits. One thread at a time.

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

        def connected() -> bool:
            if not peer_lives():
                raise TransportError("the other process of the raw NCCL loop ended; what it wrote to stderr says why")
            return self._settled()

        self._nccl = nccl
        self._device = device
        self._peer = 1 - rank
        self._never = threading.Event()
        self._raw: Any = None
        make_stream: Any = torch.cuda.Stream  # untyped
        make_event: Any = torch.cuda.Event
        with nccl.translated(), torch.cuda.device(device):
            self._stream = make_stream(device)
            self._end = make_event()
            self._buffers = [torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(count)]
            torch.cuda.synchronize(device)  # the link's stream waits for no other
            config = nccl.core.NCCLConfig(blocking=False, max_ctas=MAX_CTAS)
            self._raw = nccl.core.Communicator.init(2, rank, nccl.core.UniqueId.from_bytes(unique_id), config)
            Watch(CONNECT_S, self._never).until(connected, "connecting the raw NCCL loop")

    def send(self, nbytes: int, count: int) -> None:
        """Enqueue `count` sends, then wait for the last."""
        self._run(self._raw.send, nbytes, count)

    def receive(self, nbytes: int, count: int) -> None:
        """Enqueue `count` receives, then wait for the last."""
        self._run(self._raw.recv, nbytes, count)

    def abort(self) -> None:
        """End it. An abort that hangs is left behind."""
        raw, self._raw = self._raw, None
        if raw is not None:
            thread = threading.Thread(target=self._abort, args=(raw,), name="specd-raw-nccl-abort", daemon=True)
            thread.start()
            thread.join(ABORT_S)

    def _run(self, call: Callable[..., None], nbytes: int, count: int) -> None:
        import torch

        watch = Watch(STEP_S, self._never)
        with self._nccl.translated(), torch.cuda.device(self._device):
            for index in range(count):
                buffer = self._buffers[index % len(self._buffers)]
                call(buffer[:nbytes], self._peer, stream=int(self._stream.cuda_stream))
                watch.until(self._settled, "a step of the raw NCCL loop")
            self._end.record(self._stream)
            watch.until(self._end.query, "the raw NCCL loop")

    def _settled(self) -> bool:
        state = int(self._raw.get_async_error())
        if state not in (SUCCESS, IN_PROGRESS):
            raise TransportError(f"the raw NCCL loop failed: {self._nccl.core.get_error_string(state)}")
        return state == SUCCESS

    def _abort(self, raw: Any) -> None:
        import torch

        with contextlib.suppress(TransportError), self._nccl.translated(), torch.cuda.device(self._device):
            raw.abort()


class NcclLoop:
    """Receives on the trainer's GPU what a process of its own sends from the daemon's, without any other message.

    What is timed begins behind a receive that is not, so that both sides are in their loop.
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
        self._process.start()
        theirs.close()
        self._link: Link | None = None
        try:
            self._link = Link(found, trainer, RECEIVER, unique_id, nbytes, count, self._process.is_alive)
            self.one(1)  # the first message sets up the connection
        except BaseException:
            self.close()
            raise

    def one(self, nbytes: int) -> float:
        return self.stream(nbytes, 1)

    def stream(self, nbytes: int, count: int) -> float:
        assert self._link is not None
        try:
            self._pipe.send_bytes(msgspec.msgpack.encode(_Order(nbytes=nbytes, count=count + 1)))
        except OSError:
            raise TransportError("the sender of the raw NCCL loop is gone; what it wrote to stderr says why") from None
        self._link.receive(nbytes, 1)
        begin = time.perf_counter()
        self._link.receive(nbytes, count)
        return time.perf_counter() - begin

    def close(self) -> None:
        if self._pipe.closed:
            return
        self._pipe.close()
        if self._link is not None:
            self._link.abort()
        self._process.join(15)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _sender(pipe: Connection, device: str, unique_id: bytes, nbytes: int, count: int) -> None:
    """The child: sends what it is told to, until the pipe closes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    link = Link(library(), device, SENDER, unique_id, nbytes, count, parent.is_alive)
    with contextlib.suppress(EOFError, OSError, TransportError):
        while True:
            order = msgspec.msgpack.decode(pipe.recv_bytes(), type=_Order)
            link.send(order.nbytes, order.count)
    link.abort()
