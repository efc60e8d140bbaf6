"""Both ends of a worker under test: control's end of its pipes, and a transport's server that notes what it is told."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import zmq

from fills import HIDDEN, VOCAB, draw_tokens
from specd.config.settings import CaptureConfig, DaemonConfig, ReplayConfig, RingConfig, TargetConfig
from specd.errors import TargetError, TransportError
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec
from specd.targets.base import CaptureJob
from specd.targets.registry import load_target
from specd.transports import registry
from specd.transports.base import ServerContext, SlotRef, Traits
from specd.worker.messages import Filled, FillSlot, decode, encode
from specd.worker.worker import WorkerConfig

MODEL = f"synthetic:hidden={HIDDEN},vocab={VOCAB},layers=8"
SPEC = CaptureSpec(taps=(1, 4), final=True, dtype="float32")


class Control:
    """Control's end of a worker's two pipes."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        prefix: str,
        device: str,
        *transports: str,
        exact: bool = True,
        slots: int = 3,
        replay: ReplayConfig | None = None,
    ) -> None:
        self.epoch = secrets.token_bytes(16)
        self.to, self.hears = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        self.to.bind(f"{prefix}.in")
        self.hears.bind(f"{prefix}.out")
        self.hears.set(zmq.RCVTIMEO, 60_000)
        self.worker = WorkerConfig(
            daemon=DaemonConfig(
                target=TargetConfig(model=MODEL, device=device, exact=exact),
                transports=transports,
                ring=RingConfig(slots=slots, slot_tokens=64),
                capture=CaptureConfig(num_taps=2, final=True),
                replay=replay or ReplayConfig(),
            ),
            epoch=self.epoch,
            inbox=f"{prefix}.in",
            outbox=f"{prefix}.out",
            serving=ServerContext(),
        )

    def send(self, note: Any) -> None:
        self.to.send(encode(note), zmq.NOBLOCK)

    def hear(self) -> Any:
        return decode(self.hears.recv())

    def fill(self, slot: int, generation: int, num_tokens: int) -> FillSlot:
        """Ask for a batch of `num_tokens` tokens; returns what was asked."""
        task = FillSlot(
            slot=slot,
            generation=generation,
            spec=SPEC,
            tokens=draw_tokens(num_tokens, seed=generation).tobytes(),
            lengths=np.array([num_tokens], "<i4").tobytes(),
            layout=slot_layout(SPEC, HIDDEN, num_tokens),
        )
        self.send(task)
        return task

    def filled(self, slot: int, generation: int) -> None:
        note = self.hear()
        assert isinstance(note, Filled), note
        assert (note.slot, note.generation) == (slot, generation)

    def close(self) -> None:
        self.to.close(linger=0)
        self.hears.close(linger=0)


def expected(task: FillSlot) -> bytes:
    """What a target on the CPU writes for the same batch."""
    slot = memoryview(bytearray(task.layout.nbytes))
    tokens, lengths = np.frombuffer(task.tokens, "<i4"), np.frombuffer(task.lengths, "<i4")
    load_target(TargetConfig(model=MODEL)).run(
        [CaptureJob(tokens=tokens, lengths=lengths, spec=SPEC, layout=task.layout, slot=slot)]
    )
    return bytes(slot)


class Served:
    """A transport, and its server, that notes what it is told. memory, scope, rank, sealed: of its traits.

    missing: why it is not available. problem, fault: why it cannot be served.
    """

    def __init__(
        self, memory: Sequence[str], scope: str = "host", rank: int | None = None, sealed: bool = False
    ) -> None:
        self.traits = Traits(
            memory=frozenset(memory),  # type: ignore[arg-type]
            scope=scope,  # type: ignore[arg-type]
            one_sided=True,
            needs_recv_ready=False,
            abortable=True,
            rank=rank,
            sealed=sealed,
        )
        self.missing = ""
        self.problem = ""
        self.fault: Exception | None = None
        self.arena: Any = None
        self.closed_before_its_arena = False
        self.dropped: list[bytes] = []

    def available(self, _device: str) -> str | None:
        return self.missing or None

    def server(self, arena: Any, _context: ServerContext) -> Served:
        if self.fault is not None:
            raise self.fault
        if self.problem:
            raise TransportError(self.problem)
        self.arena = arena
        return self

    def accept(self, _session: bytes, hello: bytes) -> bytes:
        if hello:
            raise TransportError("not to you")
        return b"offer"

    def publish(self, _session: bytes, _ref: SlotRef) -> None: ...
    def drop(self, session: bytes) -> None:
        self.dropped.append(session)

    def close(self) -> None:
        self.closed_before_its_arena = self.arena.generation(0) >= 0


Known = dict[str, Served]


def only_these(monkeypatch: pytest.MonkeyPatch) -> Known:
    """The transports there are, by name, and more if a test adds them; one that it deletes cannot be imported."""
    found: Known = {
        "cuda_ipc": Served(["device"], rank=200),
        "nccl": Served(["device"], "anywhere", rank=400),
        "shm": Served(["host"], rank=500),
        "bytes": Served(["host"], "anywhere", rank=600),
    }

    def load(name: str) -> Served:
        if name not in found:
            raise TransportError(f"{name} cannot be imported")
        return found[name]

    first = tuple(found)
    monkeypatch.setattr(registry, "names", lambda: list(dict.fromkeys([*first, *found])))
    monkeypatch.setattr(registry, "load", load)
    return found


class Pending:
    """A completion that comes when the test says so."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: Exception | None = None

    def wait(self) -> None:
        assert self.done.wait(30)
        if self.error is not None:
            raise self.error


class SlowTarget:
    """A target on a device whose forwards end when the test says so."""

    def __init__(self) -> None:
        inner = load_target(TargetConfig(model=MODEL, device="cuda:0"))
        self.contract, self.device = inner.contract, inner.device
        self._inner = inner
        self.pending: list[Pending] = []
        self.sizes: list[list[int]] = []
        self.began = threading.Semaphore(0)

    def run(self, fills: Sequence[CaptureJob]) -> Pending:
        if int(fills[0].tokens.size) == 13:
            raise TargetError("thirteen tokens")
        self._inner.run(fills)
        self.sizes.append([int(fill.tokens.size) for fill in fills])
        self.pending.append(Pending())
        self.began.release()
        return self.pending[-1]

    def artifact(self, name: str) -> memoryview:
        return self._inner.artifact(name)

    def close(self) -> None:
        self._inner.close()


class Stuck(SlowTarget):
    """A target whose device fails under the first forward, while the second waits for it for ever."""

    def __init__(self, _config: TargetConfig) -> None:
        super().__init__()

    def run(self, fills: Sequence[CaptureJob]) -> Pending:
        if self.pending:
            threading.Event().wait()
        pending = super().run(fills)
        pending.error = RuntimeError("CUDA error: unspecified launch failure")
        threading.Timer(0.3, pending.done.set).start()
        return pending
