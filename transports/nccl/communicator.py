"""One end of an NCCL communicator of two ranks, with a deadline on every step.

It connects non-blocking: a call only starts something, and until the communicator's state says that this is over,
neither it nor the stream may be used. It sends and receives blocking: a call is over when its kernel is on the stream.
It is always aborted, never destroyed, because destroying one waits for the peer.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from specd.errors import TransportError, pip_install
from specd.transports.nccl.side import Side
from specd.transports.nccl.watch import Watch

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

UNIQUE_ID_BYTES: Final = 128
ABORT_S: Final = 10.0
"""Longest wait for an abort; 0.5 s is usual when the peer was killed."""
START_S: Final = 5.0
"""How long an NCCL call may take to start; it does so at once, except under NCCL_COMM_BLOCKING=0."""
_SUCCESS: Final = 0
_IN_PROGRESS: Final = 7
_quarantine: list[object] = []
"""Memory and streams that a communicator may still touch because its abort hung: never freed, so never reused."""


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
            f"nccl needs nccl4py, which cannot be imported ({error}): install it with: {pip_install('nccl')}"
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

    Connect non-blocking, send blocking: each mode lacks what the other has. Connecting a non-blocking communicator can
    be watched, and ended by an abort; but each of its calls starts a thread, 0.15 ms. A call of a blocking one is a
    plain launch; but connecting it may wait for a dead peer, in a thread that nothing ends. So a non-blocking one
    connects, and a blocking one is split from it, shares its connections (NCCL's splitShare) and carries the messages.
    Both ranks do the same in the same order.

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
        """End it now, whatever is in flight; False if that hangs, and then it is given up. Idempotent.

        held: memory that its kernels may use until they have ended.
        """
        if self._ended or self._first is None:
            return True
        self._ended = True
        if self._hanging is None or not self._hanging.is_alive():
            # Never on the caller's thread: an abort may hang.
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

        # If nothing is shared (NCCL_COMM_SPLIT_SHARE_RESOURCES=0), this connects, and may hang: so on a thread of its
        # own. While it is in there, an abort would free memory that it uses.
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
