"""The protocol specd set out to replace, emulated: an HTTP request a batch, one in flight, tensors one after the other.

The serving process runs the target, waits for the whole device, answers, and sends every tap and the echoed token ids
and masks with torch.distributed; the trainer receives them in that order and waits for its whole device. It is run as a
process that takes a JSON line on standard input, and it measures the bare target before it serves.
"""

from __future__ import annotations

import datetime
import http.client
import http.server
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import msgspec
import torch

from specd.bench.pipeline.bare_target import Bare, fill, measure, slot
from specd.bench.pipeline.processes import answers, end_with_input
from specd.bench.pipeline.settings import Settings
from specd.bench.pipeline.step import synchronize
from specd.errors import SpecdError, TransportError
from specd.protocol.batch import Batch, Delivery, slot_layout
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import TargetContract

ECHOED = 3
"""Token ids, attention mask and loss mask come back with the states, int64 each: 24 bytes a token."""
DEADLINE = datetime.timedelta(seconds=120)
HANDSHAKE_S = 30.0
SERVER, TRAINER = 0, 1


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What the serving process is told. store: path of a new file where both sides meet. backend: gloo or nccl."""

    settings: Settings
    spec: CaptureSpec
    store: str
    backend: str


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """What the serving process says when it serves, or why it does not."""

    port: int = 0
    bare: Bare | None = None
    memory_bytes: int = 0
    error: str = ""


def payload_bytes(spec: CaptureSpec, hidden: int) -> int:
    """Bytes a token takes: its taps in bfloat16, and what is echoed."""
    return len(spec.taps) * hidden * 2 + ECHOED * 8


@contextmanager
def joined(backend: str, store: str, rank: int, world: int, timeout: datetime.timedelta = DEADLINE) -> Iterator[Any]:
    """A process group of this benchmark alone: an engine in the same process may have the default one.

    Gloo takes the loopback interface unless told otherwise. Raises TransportError when the group does not form.
    """
    import torch.distributed as dist

    name = "GLOO_SOCKET_IFNAME"
    given = os.environ.get(name)
    os.environ.setdefault(name, "lo")
    distributed: Any = dist  # its classes are not all typed
    group: Any
    try:
        meeting = distributed.PrefixStore("specd", distributed.FileStore(store, world))
        meeting.set_timeout(timeout)
        if backend == "nccl":
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = timeout
            group = distributed.ProcessGroupNCCL(meeting, rank, world, options)
        else:
            group = distributed.ProcessGroupGloo(meeting, rank, world, timeout)
    except RuntimeError as error:
        raise TransportError(f"torch.distributed does not form a {backend} group: {error}") from None
    finally:
        if given is None:
            del os.environ[name]
    try:
        yield group
    finally:
        if backend == "nccl":
            group.abort()


def shake_hands(group: Any, rank: int, device: str) -> None:
    """Send a word from the server to the trainer: its first transfer makes a communicator, and is where it would hang.

    Raises TransportError when it does not arrive in time; the group is of no use then.
    """
    word = torch.zeros(1, device=device)
    sends = rank == SERVER
    try:
        work = group.send([word], TRAINER, 0) if sends else group.recv([word], SERVER, 0)
        limit = time.monotonic() + HANDSHAKE_S
        while device != "cpu" and not work.is_completed():  # its wait is the device's, which nothing could end
            if time.monotonic() > limit:
                raise TransportError(f"nothing was transferred in {HANDSHAKE_S:g} s")
            time.sleep(0.001)
        work.wait()
    except RuntimeError as error:
        raise TransportError(f"torch.distributed transfers nothing: {error}") from None
    synchronize(device)


class Client:
    """The trainer's side. group: that `joined` gave. device: where the states go."""

    def __init__(
        self, port: int, group: Any, backend: str, spec: CaptureSpec, contract: TargetContract, device: str
    ) -> None:
        self._group = group
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE.total_seconds())
        self._wire = device if backend == "nccl" else "cpu"
        self._spec, self._hidden, self._device = spec, contract.hidden_size, device
        self._thread = ThreadPoolExecutor(1, "seed-client")

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
        taps = []
        for _ in self._spec.taps:
            tap = torch.empty(batch.num_tokens, self._hidden, dtype=torch.bfloat16, device=self._wire)
            self._receive(tap)
            taps.append(tap.to(self._device))
        for _ in range(ECHOED):
            self._receive(torch.empty(batch.num_tokens, dtype=torch.int64, device=self._wire))
        synchronize(self._device)
        return Delivery(batch, torch.stack(taps, 1))

    def _receive(self, into: torch.Tensor) -> None:
        self._group.recv([into], SERVER, 0).wait()


class _Handler(http.server.BaseHTTPRequestHandler):
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


def serve(job: Job, answer: Callable[[msgspec.Struct], None]) -> None:
    """Load, measure, then serve for ever."""
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
        ref = slot_layout(job.spec, hidden, batch.num_tokens).tensors[0]
        taps = raw[ref.offset : ref.offset + ref.nbytes].view(getattr(torch, ref.dtype)).view(ref.shape)
        states = [taps[:, index].to(torch.bfloat16).contiguous().to(wire) for index in range(len(job.spec.taps))]
        echo = [torch.from_numpy(part.astype(np.int64)).to(wire) for part in (tokens, np.ones_like(tokens), mask)]
        return [*states, *echo]

    handler = type("Handler", (_Handler,), {"capture": staticmethod(capture)})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        used = memory(target.device)
        answer(Serving(port=server.server_port, bare=bare, memory_bytes=used))
        with joined(job.backend, job.store, SERVER, 2) as handler.group:  # type: ignore[attr-defined]
            shake_hands(handler.group, SERVER, wire)  # type: ignore[attr-defined]
            server.serve_forever()


def main() -> None:
    """Entry of the serving process."""
    job = msgspec.json.decode(sys.stdin.readline(), type=Job)
    end_with_input()
    if job.settings.devices[0] == "cpu":
        torch.set_num_threads(1)
    with answers() as answer:
        try:
            serve(job, answer)
        except SpecdError as error:
            answer(Serving(error=str(error)))


if __name__ == "__main__":
    main()
