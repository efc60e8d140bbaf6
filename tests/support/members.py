"""A member of a share: streams batches, one a step, and keeps a digest of each delivery. A program as well.

Arguments: the daemon's endpoint, the transport, the share, how many batches, seconds of a step. Prints its digests.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
import zmq

from faults import private_directory
from fills import rounded
from samples import batch
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.metrics import Stats
from specd.protocol.batch import Delivery
from specd.protocol.capture import CaptureSpec

NUM_LAYERS = 8
FORWARD_S = 0.02
SYNTHETIC = f"synthetic:hidden=32,layers={NUM_LAYERS},vocab=128,ms={FORWARD_S * 1000:g}"
SPECS = (
    CaptureSpec(taps=(1, 3, 5), dtype="float32"),
    CaptureSpec(taps=(2, 3, 6), final=True, dtype="float32"),
    CaptureSpec(taps=(), final=True, dtype="float32"),
)


class Member(NamedTuple):
    """What became of one. took_s: of its stream."""

    digests: list[str]
    stats: Stats
    took_s: float
    sharing: int


def digest(delivery: Delivery) -> str:
    """Of all its states, and where they are."""
    found = hashlib.blake2b(digest_size=8)
    for states in (delivery.taps, delivery.final):
        found.update(str(None if states is None else tuple(states.shape)).encode())
        if states is not None:
            found.update(states.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_rounded(delivery: Delivery) -> str:
    """Of the same states once they were kept as float8."""
    taps, final = (None if states is None else rounded(states.cpu()) for states in (delivery.taps, delivery.final))
    return digest(Delivery(delivery.batch, taps, final))


def follow(
    endpoint: str,
    transport: str,
    spec: CaptureSpec,
    count: int,
    *,
    share: str = "",
    step_s: float = 0.0,
    first: int = 0,
    device: str = "cpu",
    borrow: bool = False,
    context: zmq.Context[zmq.Socket[bytes]] | None = None,
    meet: threading.Barrier | None = None,
    pause_s: float = 0.0,
    of: Callable[[Delivery], str] = digest,
) -> Member:
    """Train on batches `first` to `count` of a plan that is alike for all.

    meet: passed once it is in. pause_s: before the tenth batch. of: makes a delivery's digest.
    """
    config = SubscriberConfig(
        endpoints=(endpoint,), transport=transport, depth=2, timeout_s=60, share=share, borrow=borrow
    )
    step = threading.Event()
    with Subscriber(config, spec, device=device, context=context) as source:
        if meet is not None:
            meet.wait(30)
        begin = time.monotonic()
        digests: list[str] = []
        for delivery in source.stream(batch(index) for index in range(first, count)):
            digests.append(of(delivery))
            step.wait(step_s + pause_s * (len(digests) == 10))
        return Member(digests, source.stats(), time.monotonic() - begin, source.sharing)


def together(following: list[Callable[[], Member]]) -> list[Member]:
    """What becomes of members that run at once, each on a thread."""
    with ThreadPoolExecutor(len(following)) as pool:
        return [each.result() for each in [pool.submit(one) for one in following]]


@contextmanager
def own_process(*extra: str) -> Iterator[str]:
    """A daemon of a synthetic target in a process of its own; yields its endpoint."""
    with private_directory() as place:
        endpoint = f"ipc://{place}/d.sock"
        command = [sys.executable, "-m", "specd", "start", "--model", SYNTHETIC, "--exact", "--endpoint", endpoint]
        command += [
            "--slots",
            "12",
            "--slot-tokens",
            "64",
            "--set",
            "capture.num_taps=6",
            "--set",
            "capture.final=true",
        ]
        with subprocess.Popen([*command, *extra], stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert b"ready" in process.stdout.readline()
                yield endpoint
            finally:
                process.terminate()


if __name__ == "__main__":
    done = follow(sys.argv[1], sys.argv[2], SPECS[2], int(sys.argv[4]), share=sys.argv[3], step_s=float(sys.argv[5]))
    print(json.dumps(done.digests))
