"""What does the daemon add? Latency of a batch when it is idle, overlap when target and trainer cost the same."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from specd.bench.pipeline import processes
from specd.config.settings import DaemonConfig, RingConfig, SubscriberConfig, TargetConfig
from specd.protocol.batch import Batch
from specd.protocol.capture import CaptureSpec

if TYPE_CHECKING:
    import zmq

    from specd.protocol.batch import Delivery

SPEC = CaptureSpec(taps=(1, 3), dtype="float32")
SHAPE = "hidden=64,layers=6,vocab=512"
RING = RingConfig(slots=8, slot_tokens=256)
TINY_TOKENS = 16


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


def run() -> dict[str, Any]:
    """Both questions over every host transport."""
    return {
        "latency": [latency(transport) for transport in ("inproc", "shm", "bytes")],
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
    transport: str, model: str, exact: bool = False
) -> Iterator[tuple[str, zmq.Context[zmq.Socket[bytes]] | None]]:
    """A daemon on threads of this process for `inproc`, on processes of its own for every other transport."""
    from specd.daemon.serve import embedded

    config = DaemonConfig(target=TargetConfig(model=model, exact=exact), ring=RING)
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
