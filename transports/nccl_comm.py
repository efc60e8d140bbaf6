"""One end of an NCCL communicator of two ranks, whose every step has a deadline.

NCCL is used non-blocking: a call only starts something, and until its state says that this is over, neither the
communicator nor the stream may be used. All of that stays in here, and so does the end: a communicator is always
aborted, never destroyed, because destroying one waits for the peer.

A transfer is the payload, then a note of 64 bytes: what was sent, and whether its slot was left alone meanwhile.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from specd.errors import TransportError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

NOTE_BYTES: Final = 64
WORD_BYTES: Final = 8
WINDOW: Final = 4
"""Most transfers that may be on the stream at once."""
UNIQUE_ID_BYTES: Final = 128
ABORT_S: Final = 10.0
"""Longest wait for an abort; 0.5 s is usual when the peer was killed."""
EAGER_S: Final = 200e-6
"""How long a wait only yields the processor: NCCL wakes nobody, and the shortest sleep is as long as 16 MiB take."""
PAUSE_S: Final = (20e-6, 1e-3)
"""The first and the longest sleep between two looks after that."""
_SUCCESS: Final = 0
_IN_PROGRESS: Final = 7
_POOL: Final = 32
"""How many high-priority streams torch has for a device; it hands them out in turn, whoever uses them."""
_quarantine: list[object] = []
"""What a communicator that could not be aborted may still touch: never freed, so that nobody else is given it."""


class Watch:
    """How long a piece of work may take, and whether it was called off meanwhile."""

    __slots__ = ("_called_off", "_deadline", "_seconds")

    def __init__(self, seconds: float, called_off: threading.Event) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._called_off = called_off

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Look until `done`. Raises TransportError, beginning with `what`, when time is up or it is called off."""
        begin, pause = time.monotonic(), PAUSE_S[0]
        while not done():
            now = time.monotonic()
            if self._called_off.is_set():
                raise TransportError(f"{what} was called off")
            if now > self._deadline:
                raise TransportError(f"{what} took longer than {self._seconds:g} s")
            if now - begin < EAGER_S:
                time.sleep(0)
            else:
                self._called_off.wait(pause)
                pause = min(2 * pause, PAUSE_S[1])


class Side:
    """A stream of its own on one device, which waits for no other, and copies and marks on it."""

    def __init__(self, device: str) -> None:
        import torch

        stream: Any = torch.cuda.Stream  # untyped
        self._device = device
        with _choosing:
            for _ in range(_POOL):
                # Of high priority: a few blocks get their SMs as a model's retire, not when its whole queue is done.
                self._stream = stream(device, priority=-1)
                if (device, self.handle) not in _sides:
                    break
            else:
                raise TransportError(f"{_POOL} NCCL communicators are open on {device}: it has no stream for another")
            _sides[device, self.handle] = self

    @property
    def handle(self) -> int:
        """The stream as a cudaStream_t."""
        return int(self._stream.cuda_stream)

    @staticmethod
    def on(device: str) -> AbstractContextManager[Any]:
        """Make a device the calling thread's; the one that a new thread starts with may be another trainer's."""
        import torch

        return torch.cuda.device(device)

    def current(self) -> AbstractContextManager[Any]:
        """The same for the device of this stream."""
        return self.on(self._device)

    def rows(self, count: int, *, on_host: bool) -> torch.Tensor:
        """Zeros, uint8 [count, NOTE_BYTES], on the device or page-locked on the host."""
        import torch

        if on_host:
            return torch.zeros((count, NOTE_BYTES), dtype=torch.uint8, pin_memory=True)
        rows = torch.zeros((count, NOTE_BYTES), dtype=torch.uint8, device=self._device)
        torch.cuda.current_stream(self._device).synchronize()  # this stream does not wait for that one
        return rows

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """Copy once the stream gets there; page-locked host memory is read no earlier."""
        import torch

        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)

    def mark(self) -> Callable[[], bool]:
        """Whether all that is on the stream now is over, asked later."""
        import torch

        event_class: Any = torch.cuda.Event  # untyped
        event = event_class()
        event.record(self._stream)
        query: Callable[[], bool] = event.query
        return query

    def idle(self) -> bool:
        """Whether nothing is on the stream."""
        return bool(self._stream.query())


_choosing = threading.Lock()
_sides: weakref.WeakValueDictionary[tuple[str, int], Side] = weakref.WeakValueDictionary()
"""Who has which stream: a transfer that waits for one trainer must not hold up another's."""


class Library(NamedTuple):
    """nccl4py and the libnccl it calls. core: the module. errors: what it raises. version: such as 22809."""

    core: Any
    errors: tuple[type[Exception], ...]
    version: int
    side: type[Side] = Side

    def unique_id(self, device: str) -> bytes:
        """What two ranks find each other by: the address of a socket that NCCL opens in this process.

        NCCL listens until both ranks have come: a peer that never does costs this process a thread and a socket.
        """
        with self.translated(), self.side.on(device):
            return bytes(self.core.get_unique_id())

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Turn what nccl4py and CUDA raise into a TransportError."""
        try:
            yield
        except self.errors as error:
            raise TransportError(f"NCCL {version_text(self.version)} failed: {error}") from None


def library() -> Library:
    """nccl4py, which finds its way to the libnccl that torch ships.

    Raises TransportError when either is missing, with what to install.
    """
    try:
        # First, so that its libnccl is the one in the process: nccl4py's loader takes what is loaded before it looks.
        importlib.import_module("torch")
        core = importlib.import_module("nccl.core")
        # nccl4py 0.6: nccl.core exports neither NCCLError nor a version that does not scan the whole library.
        bindings: Any = importlib.import_module("nccl.bindings.nccl")
    except ImportError as error:
        raise TransportError(
            f"nccl needs nccl4py, which cannot be imported ({error}): install it with pip install 'specd[nccl]'"
        ) from None
    # RuntimeError: torch's CUDA errors, and a libnccl that is not found or lacks a function.
    errors = (bindings.NCCLError, core.NcclInvalid, RuntimeError)
    try:
        version = int(bindings.get_version())
    except errors as error:
        raise TransportError(f"libnccl cannot be loaded: {error}; it comes with a CUDA torch") from None
    return Library(core, errors, version)


def version_text(version: int) -> str:
    """22809 as 2.28.9."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


class Transfer:
    """A transfer on its way.

    over: whether the stream is past it. note: where the receiver finds the note then.
    """

    __slots__ = ("note", "over")

    def __init__(self) -> None:
        self.over: Callable[[], bool] = _not_yet
        self.note: torch.Tensor | None = None


class Communicator:
    """One of two ranks, connected on construction; one thread at a time.

    It shares no communicator, group or stream with anybody, so a trainer may have process groups of its own, and a
    target as well. What they do share are the GPU's SMs and hardware queues: a transfer that waits for its peer may
    hold back a collective of another communicator, and that peer may be waiting for this very collective. `max_ctas`
    leaves SMs to others; what still waits in a ring ends when the first deadline aborts its transfer.

    max_ctas: most SMs a kernel of it takes; the same on both ranks. Raises TransportError when the peer does not
    come before `watch` ends.
    """

    def __init__(self, library: Library, device: str, rank: int, unique_id: bytes, max_ctas: int, watch: Watch) -> None:
        self._library = library
        self._peer = 1 - rank
        self._raw: Any = None
        self._ended = False
        self._count = 0
        core = library.core
        with library.translated():
            self._side = library.side(device)
        try:
            with library.translated(), self._side.current():
                self._outgoing, self._incoming = (self._side.rows(WINDOW, on_host=True) for _ in range(2))
                self._sent, self._received = (self._side.rows(WINDOW, on_host=False) for _ in range(2))
                config = core.NCCLConfig(blocking=False, max_ctas=max_ctas)
                self._raw = core.Communicator.init(2, rank, core.UniqueId.from_bytes(unique_id), config)
                watch.until(self._settled, "connecting to the peer over NCCL")
                # Both ways are set up by the first message, which takes longest: now, not under the first transfer.
                self._greet(watch)
                watch.until(self._side.mark(), "the first message over NCCL")
        except BaseException:
            self.abort()
            raise

    def send(self, transfer: Transfer, payload: torch.Tensor, note: bytes, word: torch.Tensor, watch: Watch) -> None:
        """Put a transfer on the stream.

        payload: uint8 [n] on the device. note: NOTE_BYTES; its last WORD_BYTES are replaced by `word`, page-locked
        host memory, as it is when the payload was read. At most WINDOW may be under way.
        """
        row = self._next_row()
        self._outgoing.numpy()[row] = np.frombuffer(note, np.uint8)
        with self._library.translated(), self._side.current():
            self._side.copy(self._sent[row], self._outgoing[row])
            self._call("send", payload, watch)
            self._side.copy(self._sent[row, -WORD_BYTES:], word)
            self._call("send", self._sent[row], watch)
            transfer.over = self._side.mark()

    def receive(self, transfer: Transfer, into: torch.Tensor, watch: Watch) -> None:
        """Put the peer's next transfer on the stream; `into` (uint8 [n] on the device) has exactly its size."""
        row = self._next_row()
        with self._library.translated(), self._side.current():
            self._call("recv", into, watch)
            self._call("recv", self._received[row], watch)
            self._side.copy(self._incoming[row], self._received[row])
            transfer.note = self._incoming[row]
            transfer.over = self._side.mark()

    def over(self, transfer: Transfer) -> bool:
        """Whether a transfer is over. Raises TransportError when the communicator failed: then none is, ever."""
        with self._library.translated():
            over = transfer.over()
            # After the look at the stream: what ended because of a failure must not be taken for received.
            return self._settled() and over

    def abort(self, held: object = None) -> bool:
        """End it now, whatever is under way; False if that hangs, and then it is given up. Idempotent.

        held: memory that its kernels may use until they have ended.
        """
        if self._ended:
            return True
        self._ended = True
        if self._raw is None:
            return True
        # Never on the caller's thread: an abort that hangs must not take anybody with it.
        thread = threading.Thread(target=self._abort, name="specd-nccl-abort", daemon=True)
        thread.start()
        thread.join(ABORT_S)
        if not thread.is_alive() and self._comes_to_rest():
            return True
        _quarantine.append((self, held))
        log.error("an NCCL communicator did not end within %g s: its stream and buffers are given up", ABORT_S)
        return False

    def _abort(self) -> None:
        try:
            with self._library.translated(), self._side.current():
                self._raw.abort()
        except TransportError as error:
            log.warning("aborting an NCCL communicator: %s", error)

    def _comes_to_rest(self) -> bool:
        try:
            with self._library.translated():
                Watch(1.0, threading.Event()).until(self._side.idle, "the end of its kernels")
        except TransportError:
            return False
        return True

    def _next_row(self) -> int:
        if self._ended:
            raise TransportError("this NCCL communicator has ended")
        self._count += 1
        return self._count % WINDOW

    def _call(self, method: str, buffer: torch.Tensor, watch: Watch) -> None:
        getattr(self._raw, method)(buffer, self._peer, stream=self._side.handle)
        watch.until(self._settled, f"starting an NCCL {method}")

    def _greet(self, watch: Watch) -> None:
        """A message each way, in one kernel."""
        with self._library.core.group():
            self._raw.send(self._sent[0], self._peer, stream=self._side.handle)
            self._raw.recv(self._received[0], self._peer, stream=self._side.handle)
        watch.until(self._settled, "starting an NCCL exchange")

    def _settled(self) -> bool:
        """Whether the last call has done its work, so that the next may be made."""
        state = int(self._raw.get_async_error())
        if state not in (_SUCCESS, _IN_PROGRESS):
            raise TransportError(f"NCCL failed: {self._library.core.get_error_string(state)}; the peer may be gone")
        return state == _SUCCESS

    def __repr__(self) -> str:
        return f"Communicator(rank {1 - self._peer} of 2, {'ended' if self._ended else 'connected'})"


def _not_yet() -> bool:
    return False
