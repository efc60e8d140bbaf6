"""A batch that kills the worker ends the run of whoever asked for it, and of nobody else."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from faults import ASKED, SEED
from samples import batch
from specd.client.subscriber import Subscriber
from specd.config.settings import DaemonConfig, RingConfig, SubscriberConfig, TargetConfig
from specd.daemon import supervisor
from specd.daemon.serve import Embedded, embedded
from specd.errors import BatchError
from specd.protocol.capture import CaptureSpec
from specd.targets.base import CaptureJob, Target
from specd.targets.registry import load_target
from specd.worker import worker

SPEC = CaptureSpec(taps=(1, 3), dtype="float32")
SETTINGS = DaemonConfig(
    target=TargetConfig(model="synthetic:hidden=16,layers=6,vocab=128,ms=2"),
    ring=RingConfig(slots=10, slot_tokens=64, max_sessions=2),
)
TRIES = ASKED or 3
POISONED, INNOCENT = range(1000, 1040), range(60)
"""Which batches either trainer asks for."""


class Fragile:
    """A target whose worker dies of one batch, whatever shares its forward."""

    def __init__(self, inner: Target, poison: int) -> None:
        self._inner = inner
        self.contract, self.device = inner.contract, inner.device
        self._poison = batch(poison).tokens.tobytes()

    def run(self, fills: Sequence[CaptureJob]) -> object:
        if any(fill.tokens.tobytes() == self._poison for fill in fills):
            raise RuntimeError("an illegal memory access was encountered")
        return self._inner.run(fills)

    def artifact(self, name: str) -> Any:
        return self._inner.artifact(name)

    def close(self) -> None:
        self._inner.close()


def received(host: Embedded, indices: range, depth: int, into: list[int]) -> None:
    config = SubscriberConfig(endpoints=(host.endpoint,), depth=depth, timeout_s=60)
    with Subscriber(config, SPEC, context=host.context) as source:
        for delivery in source.stream(batch(index) for index in indices):
            assert delivery.taps is not None
            into.append(delivery.batch.index)


@pytest.mark.parametrize("number", range(TRIES))
def test_the_innocent_trainers_run_is_exact_and_the_poisoners_error_names_its_batch(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF_S", (0.0, 0.01))
    rng = random.Random(SEED + number)
    poison = rng.choice(POISONED)
    monkeypatch.setattr(worker, "load_target", lambda config: Fragile(load_target(config), poison))
    innocent: list[int] = []
    poisoned: list[int] = []
    with embedded(SETTINGS) as host:
        trainer = threading.Thread(target=received, args=(host, INNOCENT, rng.randint(0, 4), innocent))
        trainer.start()
        with pytest.raises(
            BatchError, match=f"batch {poison} of epoch 0 .* died 2 times while it captured this batch alone"
        ):
            received(host, POISONED, rng.randint(0, 4), poisoned)
        trainer.join(60)
    assert innocent == list(INNOCENT), f"seed {SEED}, try {number}"
    assert poisoned == list(range(POISONED.start, poison))
