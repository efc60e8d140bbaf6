"""What does the daemon add? Latency of a batch, alone and beside other sessions; overlap of target and trainer.

This module is run as the process of those other sessions: it takes a JSON line on standard input.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import zmq

from specd.bench.pipeline import processes
from specd.config.settings import DaemonConfig, RingConfig, SubscriberConfig, TargetConfig
from specd.errors import SpecdError
from specd.protocol import messages as wire
from specd.protocol.batch import Batch
from specd.protocol.capture import CaptureSpec

if TYPE_CHECKING:
    from specd.protocol.batch import Delivery

SPEC = CaptureSpec(taps=(1, 3), dtype="float32")
SHAPE = "hidden=64,layers=6,vocab=512"
RING = RingConfig(slots=8, slot_tokens=256)
TINY_TOKENS = 16
PAUSE_S = 0.003
"""Between two batches of the session whose latency is measured."""


class Crowd(msgspec.Struct, frozen=True, kw_only=True):
    """The order of a process that has `count` sessions, each of which trains a tiny batch every `step_ms`."""

    endpoint: str
    transport: str
    count: int
    step_ms: float


class Arrived(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of that process, once its sessions train."""

    count: int


def latency(transport: str, num_batches: int = 2000) -> dict[str, Any]:
    """Milliseconds from submitting a tiny batch to holding its states, against a target that takes no time."""
    with _daemon(transport, f"synthetic:{SHAPE}") as (endpoint, context):
        begins: list[float] = []
        taken: list[float] = []

        def source() -> Iterator[Batch]:
            for index in range(num_batches):
                batch = _batch(index)
                begins.append(time.perf_counter())
                yield batch

        for _ in _deliveries(endpoint, context, transport, 0, source()):
            taken.append((time.perf_counter() - begins[len(taken)]) * 1e3)
    warm = sorted(taken[num_batches // 10 :])
    return {
        "transport": transport,
        "batches": len(warm),
        "p50_ms": round(statistics.median(warm), 3),
        "p99_ms": round(warm[int(len(warm) * 0.99)], 3),
        "min_ms": round(warm[0], 3),
    }


def overlap(transport: str, cost_ms: float = 20.0, num_batches: int = 60) -> list[dict[str, Any]]:
    """Throughput at several depths against depth 0, when target and trainer both sleep `cost_ms` a batch.

    The best any pipeline can do is 2.0: the cost of both, over the cost of one.
    """
    rows: list[dict[str, Any]] = []
    with _daemon(transport, f"synthetic:{SHAPE},ms={cost_ms:g}", exact=True) as (endpoint, context):
        for depth in (0, 1, 2, 4):
            stamps: list[float] = []
            for _ in _deliveries(endpoint, context, transport, depth, (_batch(i) for i in range(num_batches))):
                stamps.append(time.perf_counter())
                time.sleep(cost_ms / 1e3)  # the trainer's own work: it waits, it does not spin
            iterations = [b - a for a, b in itertools.pairwise(stamps[5:])]
            median = statistics.median(iterations) * 1e3
            rows.append({"transport": transport, "depth": depth, "iteration_ms": round(median, 2)})
    for row in rows:
        row["speedup"] = round(rows[0]["iteration_ms"] / row["iteration_ms"], 3)
    return rows


def sessions(transport: str, count: int = 8, step_ms: float = 50.0, blocks: int = 4, size: int = 200) -> dict[str, Any]:
    """Milliseconds of a batch and of a bare answer of control for one session, alone and as one of `count`.

    The others train in a process of their own, against a target that takes no time. Blocks of both kinds alternate, and
    quartiles are over all: a machine is never as busy at one time as at another.
    """
    alone, beside = _Latencies(), _Latencies()
    ring = RingConfig(slots=3 * count, max_sessions=count, slot_tokens=256)
    with _daemon(transport, f"synthetic:{SHAPE}", ring=ring) as (endpoint, context):
        assert context is None, "its sessions are in several processes"
        numbers = itertools.count()
        for _ in range(blocks):
            alone.measure(endpoint, transport, itertools.islice(numbers, size))
            crowd = Crowd(endpoint=endpoint, transport=transport, count=count - 1, step_ms=step_ms)
            with processes.child("specd.bench.daemon", crowd) as others:
                others.answer(Arrived)
                beside.measure(endpoint, transport, itertools.islice(numbers, size))
    found: dict[str, Any] = {"transport": transport, "sessions": count, "batches": len(alone.batches)}
    for name in ("batches", "answers"):
        one, many = (statistics.quantiles(getattr(each, name), n=4) for each in (alone, beside))
        kind = "" if name == "batches" else "control_"
        found |= {f"{kind}alone_ms": round(one[1], 3), f"{kind}beside_ms": round(many[1], 3)}
        found[f"{kind}p25_ratio"], found[f"{kind}p50_ratio"] = (round(many[at] / one[at], 2) for at in (0, 1))
    return found


class _Latencies:
    """Milliseconds of one session's batches, from submitting to holding the states, and of answers to RENEW."""

    def __init__(self) -> None:
        self.batches: list[float] = []
        self.answers: list[float] = []

    def measure(self, endpoint: str, transport: str, numbers: Iterator[int]) -> None:
        """Measure one block; the first tenth warms up."""
        from specd.client.ask import dial

        begins: list[float] = []
        batches: list[float] = []
        answers: list[float] = []

        def source() -> Iterator[Batch]:
            for number in numbers:
                time.sleep(PAUSE_S)
                batch = _batch(number)
                begins.append(time.perf_counter())
                yield batch

        for _ in _deliveries(endpoint, None, transport, 0, source()):
            batches.append((time.perf_counter() - begins[len(batches)]) * 1e3)
        with zmq.Context() as context, dial(context, endpoint) as socket:
            question = wire.encode(wire.Renew())  # without a session: answered by REVOKE at once
            for _ in begins:
                time.sleep(PAUSE_S)
                begin = time.perf_counter()
                socket.send(question)
                socket.recv()
                answers.append((time.perf_counter() - begin) * 1e3)
        self.batches += batches[len(batches) // 10 :]
        self.answers += answers[len(answers) // 10 :]


def run() -> dict[str, Any]:
    """All questions over every host transport."""
    return {
        "latency": [latency(transport) for transport in ("inproc", "shm", "bytes")],
        "one of 8 sessions": [sessions(transport) for transport in ("shm", "bytes")],
        "overlap": [row for transport in ("inproc", "shm") for row in overlap(transport)],
    }


def _batch(index: int) -> Batch:
    tokens = np.random.default_rng(index).integers(0, 512, TINY_TOKENS, dtype=np.int32)
    lengths = np.array([TINY_TOKENS], np.int32)
    return Batch(
        tokens=tokens, lengths=lengths, loss_mask=np.ones(TINY_TOKENS, np.bool_), samples=(index,), index=index
    )


def _deliveries(
    endpoint: str, context: zmq.Context[zmq.Socket[bytes]] | None, transport: str, depth: int, source: Iterator[Batch]
) -> Iterator[Delivery]:
    from specd.client.subscriber import Subscriber

    config = SubscriberConfig(endpoints=(endpoint,), transport=transport, depth=depth)
    with Subscriber(config, SPEC, context=context, name="bench") as subscriber:
        yield from subscriber.stream(source)


@contextmanager
def _daemon(
    transport: str, model: str, exact: bool = False, ring: RingConfig = RING
) -> Iterator[tuple[str, zmq.Context[zmq.Socket[bytes]] | None]]:
    """A daemon on threads of this process for `inproc`, on processes of its own for every other transport."""
    from specd.daemon.serve import embedded

    config = DaemonConfig(target=TargetConfig(model=model, exact=exact), ring=ring)
    if transport == "inproc":
        with embedded(config) as host:
            yield host.endpoint, host.context
        return
    config = msgspec.structs.replace(config, transports=(transport,))
    with (
        tempfile.TemporaryDirectory(prefix="specd-") as directory,
        processes.daemon(config, Path(directory, "d.sock")) as endpoint,
    ):
        yield endpoint, None


def _train(crowd: Crowd, number: int, arrived: threading.Semaphore) -> None:
    """One session of a crowd."""
    first = (number + 1) * 10**9
    try:
        _endless(crowd, first, arrived)
    except SpecdError as error:
        print(error, file=sys.stderr)
        os._exit(1)  # whoever waits for the answer reads this


def _endless(crowd: Crowd, first: int, arrived: threading.Semaphore) -> None:
    for _ in _deliveries(
        crowd.endpoint, None, crowd.transport, 2, (_batch(first + index) for index in itertools.count())
    ):
        arrived.release()
        time.sleep(crowd.step_ms / 1e3)  # the trainer's own work


def main() -> None:
    """Entry of a crowd's process; it ends with its standard input."""
    crowd = msgspec.json.decode(sys.stdin.readline(), type=Crowd)
    with processes.answers() as answer:
        arrived = threading.Semaphore(0)
        for number in range(crowd.count):
            threading.Thread(target=_train, args=(crowd, number, arrived), daemon=True).start()
        for _ in range(3 * crowd.count):
            arrived.acquire()
        answer(Arrived(count=crowd.count))
        sys.stdin.read()


if __name__ == "__main__":
    main()
