"""The trainer's side of the pipeline benchmark: an optimizer step on a delivery, and the clock around many of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

import msgspec
import numpy as np
import torch

from specd.bench.made_up import MadeUp
from specd.bench.pipeline.settings import Lengths, Settings, SleepConfig
from specd.config.settings import TrainConfig
from specd.drafts.base import TargetParts
from specd.memory.streams import Point, reached
from specd.metrics import Stats
from specd.protocol.batch import Batch, Delivery
from specd.protocol.contract import TargetContract
from specd.train.distributed import Ranks
from specd.train.optimizer import apply_gradients, make_optimizer

CLIP = 1.0
PERCENTILES = (10, 25, 50, 75, 90)


Draw = Callable[[Lengths], list[Batch]]
"""Draws the batches of one row, as many as `Settings.drawn`: other tokens each time, so that no ring still has them."""


class TrainingStep(Protocol):
    """What a trainer does with a delivery: one whole optimizer step, alone or as one of several ranks."""

    parameters: list[torch.nn.Parameter]

    def join(self, ranks: Ranks) -> None:
        """Train together from the next step on, with the weights of rank 0."""
        ...

    def __call__(self, delivery: Delivery, wait: bool) -> None:
        """wait: return when the device is done with this step, not only with the one before it."""
        ...


class SleepingStep:
    """A step that takes the time it is told to take: it sleeps, so that a target on the same processor can run."""

    def __init__(self, options: SleepConfig) -> None:
        self._options = options
        self.parameters = [torch.nn.Parameter(torch.zeros(options.params))]
        self.parameters[0].grad = torch.zeros(options.params)
        self.join(Ranks())

    def join(self, ranks: Ranks) -> None:
        """See TrainingStep."""
        self._ranks, self._gradients = ranks, ranks.gradients(self.parameters)

    def __call__(self, delivery: Delivery, wait: bool) -> None:
        """See TrainingStep."""
        time.sleep(self._options.ms / 1e3 + self._options.us_per_token * delivery.batch.num_tokens / 1e6)
        self._ranks.finish(self._gradients.works())


class OptimizerStep:
    """The step of a draft, with AdamW and clipping, one batch of each rank a step: as in the loop.

    Unless it is told to wait, a step ends when the one before it is done, as in the loop: the device has work while the
    host makes the next.
    """

    def __init__(self, objective: Any, device: str) -> None:
        self._objective = objective
        self._device = device
        self._count = 0
        self._optimizer = make_optimizer(objective.module, TrainConfig())
        self._halted = torch.zeros((), dtype=torch.float32, device=device)
        self._before: Point | None = None
        self.parameters = [parameter for parameter in objective.module.parameters() if parameter.requires_grad]
        self.join(Ranks())

    def join(self, ranks: Ranks) -> None:
        """See TrainingStep."""
        self._ranks, self._gradients = ranks, ranks.gradients(self.parameters)
        ranks.replicate(self.parameters)

    def __call__(self, delivery: Delivery, wait: bool) -> None:
        """See TrainingStep."""
        loss = self._objective.loss(delivery)
        self._gradients.last()
        loss.sum.backward()
        self._ranks.finish(self._gradients.works())
        weight, losses = loss.weight.detach(), loss.sum.detach()[None]
        if self._ranks.size > 1:
            self._count += 1
            rows, intact = self._ranks.gather(torch.stack([weight, losses[0]]).double(), self._count)
            weight, losses = rows[:, 0].sum().float(), rows[:, 1]
            self._halted = torch.maximum(self._halted, (~intact).float())
        _, self._halted = apply_gradients(self._optimizer, weight, losses, CLIP, self._halted)
        before, self._before = self._before, reached(self._device)
        last = self._before if wait else before
        if last is not None:
            last.synchronize()


def make_step(
    settings: Settings,
    contract: TargetContract,
    artifact: Callable[[str], bytes],
    device: str,
) -> TrainingStep:
    """The step of the draft that the settings ask for, alone at first. artifact: of the target.

    Raises ConfigError for a draft that does not fit the target.
    """
    if (options := settings.sleep) is not None:
        return SleepingStep(options)

    def tensor(name: str) -> torch.Tensor:
        ref = contract.artifacts[name]
        data = bytearray(artifact(ref.same_as or name))
        return torch.frombuffer(data, dtype=getattr(torch, ref.dtype)).view(ref.shape)

    embedding = tensor("embedding")
    tied = contract.artifacts["lm_head"].same_as == "embedding"
    head = embedding if tied else tensor("lm_head")
    # As often as words are: a draft vocabulary of the most frequent ones holds most of them.
    counts = np.maximum(contract.vocab_size // np.arange(1, contract.vocab_size + 1), 1)
    parts = TargetParts(contract, json.loads(artifact("config.json")), embedding, head, counts)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    objective = settings.method.objective(settings.draft_settings, parts, device, dtype, settings.seed)
    return OptimizerStep(objective, device)


class Clocked(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of each timed iteration, and what they trained in all.

    stats: of the subscriber that delivered the same batches; empty where there was none.
    """

    seconds: tuple[float, ...]
    samples: int
    tokens: int
    stats: Stats = msgspec.field(default_factory=Stats)

    @property
    def mean_s(self) -> float:
        return sum(self.seconds) / len(self.seconds)

    def figures(self, parallel: int = 1) -> dict[str, Any]:
        """The fields of a PipelineRow that follow from these times. parallel: processes that each trained as much."""
        total = sum(self.seconds)
        spread = np.percentile(np.asarray(self.seconds) * 1e3, PERCENTILES).tolist()
        return {
            "parallel": parallel,
            "iterations": len(self.seconds),
            "iteration_ms": round(self.mean_s * 1e3, 3),
            **{f"p{share}_ms": round(found, 3) for share, found in zip(PERCENTILES, spread, strict=True)},
            "samples_per_s": round(parallel * self.samples / total, 3),
            "tokens_per_s": round(parallel * self.tokens / total, 1),
        }


def clock(
    deliveries: Iterable[Delivery],
    step: TrainingStep | None,
    warmup: int = 0,
    overlap: bool = True,
    stats: Callable[[], Stats] = Stats,
    steps: int | None = None,
) -> Clocked:
    """Train on every delivery; time `steps` iterations after the first `warmup`, or all the others.

    Those that come after keep the target at work until the last one is timed. overlap: whether the next delivery may be
    asked for while the device still trains this one. stats: of the subscriber whose stream it is.
    """
    coming = iter(deliveries)

    def train(delivery: Delivery) -> None:
        if step is not None:
            step(delivery, not overlap)

    for delivery in islice(coming, warmup):
        train(delivery)
    seconds: list[float] = []
    samples = tokens = 0
    earlier, mark = stats(), time.perf_counter()
    for delivery in islice(coming, steps):
        train(delivery)
        now = time.perf_counter()
        seconds.append(now - mark)
        samples += len(delivery.batch.samples)
        tokens += delivery.batch.num_tokens
        mark = now
    found = Clocked(seconds=tuple(seconds), samples=samples, tokens=tokens, stats=stats().difference(earlier))
    for delivery in coming:
        train(delivery)
    return found


def given(batches: Iterable[Batch], states: MadeUp) -> Iterator[Delivery]:
    """Deliveries of states that are in memory already, of at least the longest batch."""
    for batch in batches:
        yield Delivery(batch, *(None if part is None else part[: batch.num_tokens] for part in states))


def synchronize(device: str) -> None:
    """Wait until a GPU has finished its work; nothing on the CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
