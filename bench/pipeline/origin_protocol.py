"""`origin`: the protocol of SpecForge's pull request 569, which specd set out to replace, emulated.

A batch is an HTTP request, one in flight. The serving process runs the target, waits for the whole device, answers, and
sends every tap, the final state where it is captured, and the echoed token ids and masks with torch.distributed, one
tensor after the other; the trainer receives them in that order and waits for its whole device. This module is run as
that process: it takes a JSON line on standard input, and measures the bare target before it serves.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from specd.bench.pipeline.bare_target import Bare, fill, measure, slot
from specd.bench.pipeline.process_group import DEADLINE, joined, shake_hands
from specd.bench.pipeline.processes import answers, child, end_with_input
from specd.bench.pipeline.result import PipelineRow
from specd.bench.pipeline.rows import row_of
from specd.bench.pipeline.settings import Settings
from specd.bench.pipeline.step import Draw, TrainingStep, clock, synchronize
from specd.errors import DaemonError, SpecdError, TransportError
from specd.memory.states import views
from specd.protocol.batch import Batch, Delivery, slot_layout
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import TargetContract

ECHOED: Final = 3
"""Token ids, attention mask and loss mask come back with the states, int64 each: 24 bytes a token."""
SERVER, TRAINER = 0, 1
"""Ranks."""


class OriginJob(msgspec.Struct, frozen=True, kw_only=True):
    """The serving process's order. store: path of a new file where both sides meet. backend: gloo or nccl."""

    settings: Settings
    spec: CaptureSpec
    store: str
    backend: str


class OriginServing(msgspec.Struct, frozen=True, kw_only=True):
    """The serving process's first answer: it serves on `port`, or `error` says why it does not."""

    port: int = 0
    bare: Bare | None = None
    memory_bytes: int = 0
    error: str = ""


def payload_bytes(spec: CaptureSpec, hidden: int) -> int:
    """Bytes a token takes: its states in bfloat16, and what is echoed."""
    return (len(spec.taps) + spec.final) * hidden * 2 + ECHOED * 8


class OriginClient:
    """The trainer's side. group: of both sides. device: where the states go."""

    def __init__(
        self, port: int, group: Any, backend: str, spec: CaptureSpec, contract: TargetContract, device: str
    ) -> None:
        self._group = group
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE.total_seconds())
        self._wire = device if backend == "nccl" else "cpu"
        self._spec, self._hidden, self._device = spec, contract.hidden_size, device
        self._thread = ThreadPoolExecutor(1, "origin-client")

    def stream(self, batches: Iterable[Batch], overlap: bool) -> Iterator[Delivery]:
        """Every batch with its states; with `overlap` one request is in flight while a batch is trained."""
        waiting: Future[Delivery] | None = None
        for batch in batches:
            asked = self._thread.submit(self._fetch, batch)
            if waiting is not None:
                yield waiting.result()
            waiting = asked
            if not overlap:
                yield waiting.result()
                waiting = None
        if waiting is not None:
            yield waiting.result()

    def close(self) -> None:
        """End the connection. Idempotent."""
        self._thread.shutdown()
        self._connection.close()

    def _fetch(self, batch: Batch) -> Delivery:
        if self._device.startswith("cuda"):
            torch.cuda.set_device(self._device)
        body = json.dumps(
            {
                "input_ids": batch.tokens.tolist(),
                "lengths": batch.lengths.tolist(),
                "loss_mask": batch.loss_mask.tolist(),
            }
        )
        self._connection.request("POST", "/capture", body.encode(), {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise TransportError(f"the emulated server failed: {text.decode(errors='replace')}")
        taps = [self._receive(torch.bfloat16, batch.num_tokens, self._hidden) for _ in self._spec.taps]
        final = self._receive(torch.bfloat16, batch.num_tokens, self._hidden) if self._spec.final else None
        for _ in range(ECHOED):
            self._receive(torch.int64, batch.num_tokens)
        synchronize(self._device)
        return Delivery(batch, torch.stack(taps, 1) if taps else None, final)

    def _receive(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        into = torch.empty(shape, dtype=dtype, device=self._wire)
        self._group.recv([into], SERVER, 0).wait()
        return into.to(self._device)


class OriginHandler(http.server.BaseHTTPRequestHandler):
    """One request: capture, wait for the device, answer, send."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    capture: Any
    group: Any = None

    def do_POST(self) -> None:
        """Answer with 200 before the tensors are sent, for the trainer to receive them."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            tensors, answer, code = self.capture(asked), b"{}", 200
        except SpecdError as error:
            tensors, answer, code = [], str(error).encode(), 500
        self.send_response(code)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        self.wfile.flush()
        for tensor in tensors:
            self.group.send([tensor], TRAINER, 0).wait()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(settings: Settings, spec: CaptureSpec, directory: Path) -> Iterator[tuple[OriginJob, OriginServing]]:
    """A serving process, from its first answer on. Raises DaemonError when it does not serve."""
    backend = "gloo" if settings.shared or settings.trainer == "cpu" else "nccl"
    job = OriginJob(settings=settings, spec=spec, store=str(directory / "origin"), backend=backend)
    with child("specd.bench.pipeline.origin_protocol", job) as server:
        first = server.answer(OriginServing)
        if first.error:
            raise DaemonError(first.error)
        yield job, first


def rows(
    job: OriginJob,
    port: int,
    contract: TargetContract,
    step: TrainingStep,
    draw: Draw,
    progress: Callable[[str], None],
) -> Iterator[PipelineRow]:
    """Train over the protocol, without and with a request in flight. port: of the process that serves `job`."""
    settings, backend = job.settings, job.backend
    with joined(backend, job.store, TRAINER, 2) as group:
        shake_hands(group, TRAINER, "cpu" if backend == "gloo" else settings.trainer)
        client = OriginClient(port, group, backend, job.spec, contract, settings.trainer)
        with contextlib.closing(client):
            for lengths in settings.lengths:
                for depth in (0, 1):
                    progress(f"origin, {lengths} lengths, depth {depth}")
                    stream = client.stream(draw(lengths), overlap=depth > 0)
                    clocked = clock(stream, step, settings.warmup, depth > 0, steps=settings.steps)
                    nbytes = payload_bytes(job.spec, contract.hidden_size) * clocked.tokens
                    devices = settings.tp + (not settings.shared)
                    row = row_of("origin", lengths, depth, backend, devices, clocked)
                    yield msgspec.structs.replace(row, bytes_per_sample=nbytes / clocked.samples)
    synchronize(settings.trainer)


def serve(job: OriginJob, answer: Callable[[msgspec.Struct], None]) -> None:
    """Load the target, measure it, then serve until the process is ended."""
    import numpy as np

    from specd.bench.pipeline.memory import memory
    from specd.targets.registry import load_target

    target = load_target(job.settings.daemon(job.settings.devices[0], 2).target)
    if target.device.startswith("cuda"):
        torch.cuda.set_device(target.device)
    bare = measure(target, job.spec, job.settings)
    hidden = target.contract.hidden_size
    place = slot(slot_layout(job.spec, hidden, job.settings.slot_tokens).nbytes, target.device)
    wire = target.device if job.backend == "nccl" else "cpu"

    def capture(asked: dict[str, Any]) -> list[torch.Tensor]:
        tokens = np.asarray(asked["input_ids"], np.int32)
        mask = np.asarray(asked["loss_mask"], np.bool_)
        batch = Batch(tokens=tokens, lengths=np.asarray(asked["lengths"], np.int32), loss_mask=mask, samples=())
        completion = target.run([fill(batch, job.spec, hidden, place)])
        if completion is not None:
            completion.wait()
        synchronize(target.device)
        raw = place if isinstance(place, torch.Tensor) else torch.frombuffer(place, dtype=torch.uint8)
        found = views(raw, slot_layout(job.spec, hidden, batch.num_tokens))
        parts = [*(found["taps"].unbind(1) if job.spec.taps else ()), *([found["final"]] if job.spec.final else [])]
        states = [part.to(torch.bfloat16).contiguous().to(wire) for part in parts]
        echo = [torch.from_numpy(part.astype(np.int64)).to(wire) for part in (tokens, np.ones_like(tokens), mask)]
        return [*states, *echo]

    handler = type("Handler", (OriginHandler,), {"capture": staticmethod(capture)})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        used = memory(target.device)
        answer(OriginServing(port=server.server_port, bare=bare, memory_bytes=used))
        with joined(job.backend, job.store, SERVER, 2) as handler.group:  # type: ignore[attr-defined]
            shake_hands(handler.group, SERVER, wire)  # type: ignore[attr-defined]
            server.serve_forever()


def main() -> None:
    """Entry of the serving process."""
    job = msgspec.json.decode(sys.stdin.readline(), type=OriginJob)
    end_with_input()
    if job.settings.devices[0] == "cpu":
        torch.set_num_threads(1)
    with answers() as answer:
        try:
            serve(job, answer)
        except SpecdError as error:
            answer(OriginServing(error=str(error)))


if __name__ == "__main__":
    main()
