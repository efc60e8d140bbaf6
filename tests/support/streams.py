"""What adapters draw from: an embedded daemon with a synthetic target, and samples whose batches are known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from specd.adapters.rows import Rows
from specd.client.subscriber import Subscriber
from specd.config.settings import DaemonConfig, RingConfig, SubscriberConfig, TargetConfig
from specd.daemon.serve import Embedded, embedded
from specd.data.batching import BatchPlan, Loader
from specd.protocol.capture import CaptureSpec

HIDDEN, VOCAB = 16, 128
SPEC = CaptureSpec(taps=(1, 3), final=True, dtype="float32")


@contextlib.contextmanager
def hosted() -> Iterator[Embedded]:
    target = TargetConfig(model=f"synthetic:hidden={HIDDEN},layers=6,vocab={VOCAB}")
    with embedded(DaemonConfig(target=target, ring=RingConfig(slots=6, max_sessions=3, slot_tokens=64))) as host:
        yield host


def subscriber(host: Embedded, spec: CaptureSpec = SPEC) -> Subscriber:
    config = SubscriberConfig(endpoints=(host.endpoint,), depth=2, timeout_s=20, connect_s=20)
    return Subscriber(config, spec, context=host.context)


def rows(lengths: Sequence[int], vocab: int = VOCAB) -> Rows:
    """Samples of these lengths, the first token of each no label."""
    rng = np.random.default_rng(3)
    table = [{"input_ids": rng.integers(0, vocab, size), "loss_mask": np.arange(size) > 0} for size in lengths]
    return Rows(table, max(lengths))


def loader(lengths: Sequence[int] = tuple(range(3, 25)), batch_tokens: int = 32, most: int = 0) -> Loader:
    samples = rows(lengths)
    return Loader(samples, BatchPlan(samples.lengths, batch_tokens, most))
