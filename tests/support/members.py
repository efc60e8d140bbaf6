"""A member of a share: streams batches, one a step, and keeps a digest of each delivery. A program as well.

Arguments: the daemon's endpoint, the transport, the share, how many batches, seconds of a step. Prints its digests.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from typing import NamedTuple

import torch
import zmq

from samples import batch
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.metrics import Stats
from specd.protocol.batch import Delivery
from specd.protocol.capture import CaptureSpec

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
            found.update(states.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def follow(
    endpoint: str,
    transport: str,
    spec: CaptureSpec,
    count: int,
    *,
    share: str = "",
    step_s: float = 0.0,
    first: int = 0,
    context: zmq.Context[zmq.Socket[bytes]] | None = None,
    meet: threading.Barrier | None = None,
) -> Member:
    """Train on batches `first` to `count` of a plan that is alike for all. meet: passed once it is in."""
    config = SubscriberConfig(endpoints=(endpoint,), transport=transport, depth=2, timeout_s=60, share=share)
    step = threading.Event()
    with Subscriber(config, spec, context=context) as source:
        if meet is not None:
            meet.wait(30)
        begin = time.monotonic()
        digests: list[str] = []
        for delivery in source.stream(batch(index) for index in range(first, count)):
            digests.append(digest(delivery))
            step.wait(step_s)
        return Member(digests, source.stats(), time.monotonic() - begin, source.sharing)


if __name__ == "__main__":
    done = follow(sys.argv[1], sys.argv[2], SPECS[2], int(sys.argv[4]), share=sys.argv[3], step_s=float(sys.argv[5]))
    print(json.dumps(done.digests))
