"""A stand-in for NCCL and the stream it runs on: both ranks in one process, messages between their memories.

What it keeps of the real thing: a call of a non-blocking communicator is only started, and using the communicator or
the stream before it is over is an error; one of a blocking communicator that has no connection yet waits for the peer
in the call, for good if need be, and an abort meanwhile is a crash; a split shares what its parent has connected, if
the parent was made so; small sends are eager until the buffers between are full; a receive of another size hangs for
good; a peer that went away is not noticed. `install` of `fake_cuda` has to be in force.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch

from specd.errors import TransportError
from specd.memory import cuda
from specd.memory.arena import Arena
from specd.transports.base import ServerContext, SlotRef
from specd.transports.nccl.communicator import UNIQUE_ID_BYTES, Library
from specd.transports.nccl.side import ROW_BYTES, Side
from specd.transports.nccl.transport import Nccl, NcclClient, NcclServer
from specd.transports.testing.hosts import LocalHost
from specd.transports.testing.suite import Rig

SUCCESS, REMOTE_ERROR, IN_PROGRESS = 0, 6, 7
BUFFERED, EAGER_BYTES = 4, 1024
"""Messages that the buffers between two ranks hold, and the largest that is sent before its receiver comes."""


class FakeError(Exception):
    """What the stand-in raises for a misuse that NCCL would punish."""


_thread = threading.local()
"""Which stream is a thread's current one."""


class FakeSide(Side):
    """A stream: what is put on it runs in order, on a thread that ends when nothing is left."""

    def __init__(self, device: str) -> None:
        self._work: deque[Callable[[], object]] = deque()
        self._lock = threading.Lock()
        self._running = False
        self.busy = False
        """NCCL is still launching onto it."""

    @staticmethod
    def on(device: str) -> contextlib.nullcontext[None]:
        cuda.ordinal(device)
        return contextlib.nullcontext()

    @property
    def handle(self) -> int:
        return self  # type: ignore[return-value]  # only the stand-in reads it

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        before, _thread.current = getattr(_thread, "current", None), self
        try:
            yield
        finally:
            _thread.current = before

    def rows(self, count: int, *, on_host: bool) -> torch.Tensor:
        return torch.zeros((count, ROW_BYTES), dtype=torch.uint8)

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        if _thread.current is not self:
            raise FakeError("a copy on another stream")
        self.put(lambda: into.copy_(source))

    def clear(self, into: torch.Tensor) -> None:
        if _thread.current is not self:
            raise FakeError("memory cleared on another stream")
        self.put(into.zero_)

    def mark(self) -> Callable[[], bool]:
        event = threading.Event()
        self.put(event.set)
        return event.is_set

    def idle(self) -> bool:
        return not self._running

    def put(self, work: Callable[[], object]) -> None:
        if self.busy:
            raise FakeError("the stream was used while NCCL was in progress")
        with self._lock:
            self._work.append(work)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._work:
                    self._running = False
                    return
                work = self._work.popleft()
            work()


class FakeNccl:
    """nccl.core, as far as it is used: two ranks in one process, messages of one way in order and sent eagerly."""

    UniqueId = SimpleNamespace(from_bytes=bytes)

    def __init__(self) -> None:
        self.Communicator = SimpleNamespace(init=self._init)
        self.pairs: dict[bytes, FakePair] = {}
        self.hang = threading.Event()
        """Set while aborts hang."""
        self.shares = True
        """Whether a split may share its parent's connections."""
        self.crashes = 0
        """How often memory was freed that a call under way uses."""
        self.looks = 0
        self.launches: Counter[int] = Counter()
        """How many kernels the ranks have put on their streams."""
        self.over = threading.Event()
        """Set to let calls go that would hang for good."""
        self.lock = threading.Lock()
        self.on_payload: Callable[[], object] = lambda: None
        """Called when a payload has left, before anything behind it."""
        self._group = threading.local()

    def get_unique_id(self) -> bytes:
        unique_id = secrets.token_bytes(UNIQUE_ID_BYTES)
        self.pairs[unique_id] = FakePair()
        return unique_id

    def NCCLConfig(self, *, blocking: bool, max_ctas: int, split_share: bool = False) -> FakeConfig:
        assert max_ctas > 0
        return FakeConfig(blocking, split_share)

    def get_error_string(self, state: int) -> str:
        return f"state {state}"

    def _init(self, nranks: int, rank: int, unique_id: bytes, config: FakeConfig) -> FakeRaw:
        assert nranks == 2
        assert not config.blocking, "this waits for the peer on the caller's thread"
        return FakeRaw(self, self.pairs[unique_id], rank, config)

    @contextlib.contextmanager
    def group(self) -> Iterator[None]:
        self._group.calls = []
        yield
        calls, self._group.calls = self._group.calls, None
        calls[0][0].launch([call[1] for call in calls], calls[0][2])

    def call(self, raw: FakeRaw, operation: tuple[str, torch.Tensor], side: FakeSide) -> None:
        if getattr(self._group, "calls", None) is None:
            raw.launch([operation], side)
        else:
            self._group.calls.append((raw, operation, side))


class FakeConfig(NamedTuple):
    blocking: bool
    split_share: bool


class FakePair:
    """What two ranks have in common. parent: of the pair that it is split from."""

    def __init__(self, parent: FakePair | None = None) -> None:
        self.parent = parent
        self.split: FakePair | None = None
        self.ranks: dict[int, FakeRaw] = {}
        self.state = SUCCESS
        self.ways: tuple[queue.Queue[bytes], ...] = (queue.Queue(BUFFERED), queue.Queue(BUFFERED))
        self.met: set[int] = set()
        """Ranks that made the first call."""

    def failed(self) -> int:
        return self.state if self.parent is None else self.parent.failed()


class FakeRaw:
    """A communicator of the stand-in.

    Non-blocking, a call is in progress until it was looked at twice, and on the stream then.
    """

    def __init__(self, core: FakeNccl, pair: FakePair, rank: int, config: FakeConfig) -> None:
        self._core, self._pair, self._rank, self._config = core, pair, rank, config
        self._aborted = threading.Event()
        self._launch: Callable[[], None] | None = None
        self._splitting: FakeRaw | None = None
        self._looks = 0
        self._inside = False
        pair.ranks[rank] = self

    def get_async_error(self) -> int:
        self._core.looks += 1
        if (state := self._pair.failed()) != SUCCESS:
            return state
        if len(self._pair.ranks) < 2 or not (self._splitting is None or self._splitting.whole()):
            return IN_PROGRESS
        self._splitting = None
        if self._launch is not None:
            self._looks += 1
            if self._looks < 2:
                return IN_PROGRESS
            launch, self._launch = self._launch, None
            launch()
        return SUCCESS

    def whole(self) -> bool:
        return len(self._pair.ranks) == 2

    def split(self, color: int, key: int, config: FakeConfig) -> FakeRaw:
        assert (color, key) == (0, self._rank)
        self._check()
        with self._core.lock:
            if self._pair.split is None or self._rank in self._pair.split.ranks:
                self._pair.split = FakePair(self._pair)
                if self._config.split_share and self._core.shares:
                    self._pair.split.met = self._pair.met
            self._splitting = FakeRaw(self._core, self._pair.split, self._rank, config)
        return self._splitting

    def send(self, buffer: torch.Tensor, peer: int, *, stream: FakeSide) -> None:
        assert peer == 1 - self._rank
        self._core.call(self, ("send", buffer), stream)

    def recv(self, buffer: torch.Tensor, peer: int, *, stream: FakeSide) -> None:
        assert peer == 1 - self._rank
        self._core.call(self, ("recv", buffer), stream)

    def launch(self, operations: list[tuple[str, torch.Tensor]], side: FakeSide) -> None:
        self._check()
        self._pair.met.add(self._rank)
        self._core.launches[self._rank] += 1
        if self._config.blocking:
            self._inside = True
            while len(self._pair.met) < 2 and not self._core.over.is_set():
                time.sleep(0.001)
            self._inside = False
            side.put(lambda: self._run(operations))
            return
        side.busy, self._looks = True, 0

        def launch() -> None:
            side.busy = False
            side.put(lambda: self._run(operations))

        self._launch = launch

    def _check(self) -> None:
        if self._launch is not None or self._splitting is not None or not self.whole():
            raise FakeError("the communicator was used while NCCL was in progress")

    def _run(self, operations: list[tuple[str, torch.Tensor]]) -> None:
        for kind, buffer in sorted(operations, key=lambda operation: operation[0] != "send"):
            if kind == "send":
                self._put(buffer.numpy().tobytes())
                if buffer.numel() != ROW_BYTES:
                    self._core.on_payload()
                continue
            while not self._aborted.is_set():
                with contextlib.suppress(queue.Empty):
                    data = self._pair.ways[1 - self._rank].get(timeout=0.005)
                    if len(data) != buffer.numel():  # as NCCL: nobody is told, and it never ends
                        self._aborted.wait()
                        return
                    buffer.numpy()[:] = memoryview(data)
                    break

    def _put(self, data: bytes) -> None:
        way = self._pair.ways[self._rank]
        while not self._aborted.is_set():
            with contextlib.suppress(queue.Full):
                way.put(data, timeout=0.005)
                break
        while len(data) > EAGER_BYTES and not way.empty() and not self._aborted.is_set():
            time.sleep(0.001)

    def abort(self) -> None:
        self._core.crashes += self._inside
        while self._core.hang.is_set():
            time.sleep(0.001)
        self._aborted.set()
        if (split := self._pair.split) is not None and split.met is self._pair.met and self._rank in split.ranks:
            split.ranks[self._rank]._aborted.set()  # they share the flag as well


NCCL = FakeNccl()
LIBRARY = Library(NCCL, (FakeError,), 22809, FakeSide)


def stop_half_way(unique_id: bytes, steps: int) -> None:
    """Be a rank 0 that takes some of the steps of connecting, of which there are four, then no other."""
    if steps == 0:
        return
    side, rows = FakeSide("cuda:1"), torch.zeros((2, ROW_BYTES), dtype=torch.uint8)
    first = NCCL.Communicator.init(2, 0, unique_id, NCCL.NCCLConfig(blocking=False, max_ctas=1, split_share=True))
    _wait(first)
    if steps > 1:
        with NCCL.group():
            first.send(rows[0], 1, stream=side)
            first.recv(rows[1], 1, stream=side)
        _wait(first)
    if steps > 2:
        while not side.idle():
            time.sleep(0.001)
        first.split(0, 0, NCCL.NCCLConfig(blocking=True, max_ctas=1))
        _wait(first)


def _wait(raw: FakeRaw) -> None:
    deadline = time.monotonic() + 10
    while raw.get_async_error() != SUCCESS:
        assert time.monotonic() < deadline, "the other rank does not come"
        time.sleep(0.001)


class FakeTransport(Nccl):
    """`nccl` over the stand-in."""

    @staticmethod
    def server(arena: Arena, context: ServerContext) -> NcclServer:
        return NcclServer(arena, context, LIBRARY)

    @staticmethod
    def client(device: str) -> NcclClient:
        return NcclClient("cuda:0", LIBRARY)


@contextlib.contextmanager
def rigged() -> Iterator[Rig]:
    """A host with three slots on a device, and its trainers, over the stand-in."""
    rig = Rig(FakeTransport, "cpu", LocalHost(FakeTransport, 3, 8192, device="cuda:1"))
    yield rig
    NCCL.hang.clear()
    rig.close()


@contextlib.contextmanager
def reset() -> Iterator[None]:
    """Around a test: what it changed of the stand-in is undone, and nothing has crashed."""
    yield
    NCCL.hang.clear()
    NCCL.over.clear()
    NCCL.shares = True
    NCCL.on_payload = lambda: None
    assert NCCL.crashes == 0


def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.001)


def sender_ends(rig: Rig, session: bytes = b"one") -> str:
    """Wait until a session's sender has ended; returns what `publish` then says."""
    said = ""

    def ended() -> bool:
        nonlocal said
        try:
            rig.host.publish(session, SlotRef(0, 1, 1))
        except TransportError as error:
            said = str(error)
        return "transfers wait" not in said and bool(said)

    until(ended)
    return said
