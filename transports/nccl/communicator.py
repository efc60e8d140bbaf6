"""One end of an NCCL communicator of two ranks, whose every step has a deadline.

Connecting is done non-blocking: a call only starts something, and until its state says that this is over, neither the
communicator nor the stream may be used. Transfers are done blocking: a call is over when its kernel is on the stream.
All of that stays in here, and so does the end: a communicator is always aborted, never destroyed, because destroying
one waits for the peer.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import select
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from specd.errors import TransportError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

ROW_BYTES: Final = 64
UNIQUE_ID_BYTES: Final = 128
ABORT_S: Final = 10.0
"""Longest wait for an abort; 0.5 s is usual when the peer was killed."""
START_S: Final = 5.0
"""How long an NCCL call may take to start; it does so at once, except under NCCL_COMM_BLOCKING=0."""
EAGER_S: Final = 500e-6
"""How long a wait does not sleep: NCCL wakes nobody, and the shortest sleep is as long as 16 MiB take."""
BYTES_S: Final = 300e9
"""A little less than NVLink gives: a wait for so many bytes is eager for as long as they may well take."""
PAUSE_S: Final = (20e-6, 1e-3)
"""The shortest and the longest sleep between two looks after that."""
_SUCCESS: Final = 0
_IN_PROGRESS: Final = 7
_POOL: Final = 32
"""How many high-priority streams torch has for a device; it hands them out in turn, whoever uses them."""
_quarantine: list[object] = []
"""What a communicator that could not be aborted may still touch: never freed, so that nobody else is given it."""


def patience(waited_s: float) -> float:
    """How long to sleep before the next look, having waited so long: a twentieth of it, within PAUSE_S."""
    return min(max(waited_s / 20, PAUSE_S[0]), PAUSE_S[1])


class Watch:
    """How long a piece of work may take, and whether it was called off meanwhile."""

    __slots__ = ("_called_off", "_deadline", "_seconds")

    def __init__(self, seconds: float, called_off: threading.Event) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._called_off = called_off

    def until(self, done: Callable[[], bool], what: str, eager_s: float = EAGER_S) -> None:
        """Look until `done`. Raises TransportError, beginning with `what`, when time is up or it is called off."""
        begin = time.monotonic()
        while not done():
            now = time.monotonic()
            if self._called_off.is_set():
                raise TransportError(f"{what} was called off")
            if now > self._deadline:
                raise TransportError(f"{what} took longer than {self._seconds:g} s")
            if now - begin < eager_s:
                # Lets other threads have the GIL. time.sleep(0) does, too, for 60 µs: the kernel's timers are slack.
                select.select((), (), (), 0)
            else:
                self._called_off.wait(patience(now - begin))


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

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make this stream and its device the calling thread's."""
        import torch

        # The device first: a change of streams would leave a context on the device that the thread had before.
        with self.on(self._device), torch.cuda.stream(self._stream):
            yield

    def rows(self, count: int, *, on_host: bool) -> torch.Tensor:
        """Zeros, uint8 [count, ROW_BYTES], on the device or page-locked on the host."""
        import torch

        if on_host:
            return torch.zeros((count, ROW_BYTES), dtype=torch.uint8, pin_memory=True)
        rows = torch.zeros((count, ROW_BYTES), dtype=torch.uint8, device=self._device)
        torch.cuda.current_stream(self._device).synchronize()  # which may be another than this
        return rows

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """Copy once the stream, which is `current`, gets there; page-locked host memory is read no earlier."""
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


class Communicator:
    """One of two ranks, connected on construction; one thread at a time.

    It is a pair, because NCCL's two kinds have one fault each. A non-blocking communicator starts a thread for every
    call, which takes 0.15 ms; but its connecting can be watched, and ended by an abort. A blocking one does no more
    than a launch; but connecting it may wait for a dead peer in a thread that nothing ends. So a non-blocking one
    connects, and a blocking one that has no connections to make, because it shares those (NCCL's splitShare), is split
    from it and used. Both ranks do the same in the same order.

    It shares nothing with any other communicator of the process, so a trainer may have process groups of its own, and a
    target as well. What they do share are the GPU's SMs and hardware queues: a transfer that waits for its peer may
    hold back a collective of another communicator, and that peer may be waiting for this very collective. `max_ctas`
    leaves SMs to others; what still waits in a ring ends when the first deadline aborts its transfer.

    max_ctas: most SMs a kernel of it takes; the same on both ranks. Raises TransportError when the peer does not
    come before `watch` ends.
    """

    def __init__(self, library: Library, device: str, rank: int, unique_id: bytes, max_ctas: int, watch: Watch) -> None:
        self._library = library
        self._rank = rank
        self._first: Any = None
        self._second: Any = None
        self._polled: Any = None
        self._hanging: threading.Thread | None = None
        self._ended = False
        with library.translated():
            self.side = library.side(device)
            """The stream of its calls."""
        try:
            with library.translated(), self.side.current():
                self._rows = self.side.rows(2, on_host=False)
                self._connect(unique_id, max_ctas, watch)
                self._split(max_ctas, watch)
        except BaseException:
            self.abort()
            raise

    def translated(self) -> AbstractContextManager[None]:
        """As `Library.translated`."""
        return self._library.translated()

    def call(self, method: Literal["send", "recv"], watch: Watch, *buffers: torch.Tensor) -> None:
        """Send or receive each buffer (uint8, on the device) in order, as one kernel that is put on the stream.

        The peer may divide the same messages among kernels in another way: what counts is their order.
        """
        if self._ended:
            raise TransportError("this NCCL communicator has ended")
        with self._library.core.group() if len(buffers) > 1 else contextlib.nullcontext():
            for buffer in buffers:
                getattr(self._second, method)(buffer, 1 - self._rank, stream=self.side.handle)
        watch.until(self.settled, f"starting an NCCL {method}")  # at once, except under NCCL_COMM_BLOCKING=0

    def settled(self) -> bool:
        """Whether the last call has done its work, so that the next may be made. Raises TransportError if it failed."""
        state = int(self._polled.get_async_error())
        if state not in (_SUCCESS, _IN_PROGRESS):
            raise TransportError(f"NCCL failed: {self._library.core.get_error_string(state)}; the peer may be gone")
        return state == _SUCCESS

    def abort(self, held: object = None) -> bool:
        """End it now, whatever is under way; False if that hangs, and then it is given up. Idempotent.

        held: memory that its kernels may use until they have ended.
        """
        if self._ended or self._first is None:
            return True
        self._ended = True
        if self._hanging is None or not self._hanging.is_alive():
            # Never on the caller's thread: an abort that hangs must not take anybody with it.
            thread = threading.Thread(target=self._abort, name="specd-nccl-abort", daemon=True)
            thread.start()
            thread.join(ABORT_S)
            if not thread.is_alive() and self._comes_to_rest():
                return True
        _quarantine.append((self, held))
        log.error("an NCCL communicator did not end within %g s: its stream and buffers are given up", ABORT_S)
        return False

    def _connect(self, unique_id: bytes, max_ctas: int, watch: Watch) -> None:
        core = self._library.core
        config = core.NCCLConfig(blocking=False, max_ctas=max_ctas, split_share=True)
        self._first = core.Communicator.init(2, self._rank, core.UniqueId.from_bytes(unique_id), config)
        self._polled = self._first
        watch.until(self.settled, "connecting to the peer over NCCL")
        # Both ways are set up by the first message, which takes longest: now, not under the first transfer.
        self._greet(self._first)
        watch.until(self.settled, "starting the first message over NCCL")
        watch.until(self.side.mark(), "the first message over NCCL")

    def _split(self, max_ctas: int, watch: Watch) -> None:
        config = self._library.core.NCCLConfig(blocking=True, max_ctas=max_ctas)
        second = self._first.split(0, self._rank, config)
        watch.until(self.settled, "splitting an NCCL communicator")  # before that it is nothing yet
        self._second = self._polled = second
        problem = ["it crashed"]

        def greet() -> None:
            try:
                with self._library.translated(), self.side.current():
                    self._greet(second)
                problem.clear()
            except TransportError as error:
                problem[:] = [str(error)]

        # If nothing is shared (NCCL_COMM_SPLIT_SHARE_RESOURCES=0), this connects: on a thread that nobody needs, and
        # as long as it is in there an abort would free what it uses.
        thread = self._hanging = threading.Thread(target=greet, name="specd-nccl-greet", daemon=True)
        thread.start()
        watch.until(lambda: not thread.is_alive(), "connecting a split NCCL communicator")
        if problem:
            raise TransportError(f"connecting a split NCCL communicator: {problem[0]}")
        watch.until(self.settled, "starting the second message over NCCL")
        watch.until(self.side.mark(), "the second message over NCCL")

    def _greet(self, raw: Any) -> None:
        """A message each way, in one kernel."""
        with self._library.core.group():
            raw.send(self._rows[0], 1 - self._rank, stream=self.side.handle)
            raw.recv(self._rows[1], 1 - self._rank, stream=self.side.handle)

    def _abort(self) -> None:
        for raw in (self._second, self._first):  # the connections' user before their owner
            try:
                with self._library.translated(), self.side.current():
                    if raw is not None:
                        raw.abort()
            except TransportError as error:
                log.warning("aborting an NCCL communicator: %s", error)

    def _comes_to_rest(self) -> bool:
        try:
            with self._library.translated():
                Watch(1.0, threading.Event()).until(self.side.idle, "the end of its kernels")
        except TransportError:
            return False
        return True

    def __repr__(self) -> str:
        return f"Communicator(rank {self._rank} of 2, {'ended' if self._ended else 'connected'})"
