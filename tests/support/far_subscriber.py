"""A program: streams batches from a daemon over bytes, compares them, and prints what it took as JSON.

Arguments: the daemon's endpoint, how many batches, tokens of each, the model the daemon serves.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from samples import batch
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig, TargetConfig
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec
from specd.targets.base import CaptureJob
from specd.targets.registry import load_target


def main(endpoint: str, count: int, num_tokens: int, model: str) -> None:
    """Stream and compare."""
    spec = CaptureSpec(taps=(1, 3), dtype="float32")
    target = load_target(TargetConfig(model=model))
    config = SubscriberConfig(endpoints=(endpoint,), transport="bytes", depth=1, timeout_s=600)
    begin = time.monotonic()
    with Subscriber(config, spec) as source:
        connect_s = time.monotonic() - begin
        arrived: list[float] = []
        for item in source.stream(batch(index, (num_tokens,)) for index in range(count)):
            arrived.append(round(time.monotonic() - begin, 2))
            tokens, lengths = item.batch.tokens, item.batch.lengths
            layout = slot_layout(spec, target.contract.hidden_size, num_tokens)
            slot = bytearray(layout.nbytes)
            job = CaptureJob(tokens=tokens, lengths=lengths, spec=spec, layout=layout, slot=memoryview(slot))
            target.run([job])
            assert item.taps is not None
            assert torch.equal(item.taps.flatten(), torch.frombuffer(slot, dtype=torch.float32))
        stats = source.stats()
        closing = time.monotonic()
    facts = {"connect_s": connect_s, "arrived": arrived, "close_s": time.monotonic() - closing}
    print(json.dumps({**facts, "resubmitted": stats.resubmitted, "reconnects": stats.reconnects}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
