"""Runs of the training loop that take no time: a tiny objective, and states that are made up from the tokens."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from specd.config.settings import TrainConfig
from specd.data.batching import Place
from specd.drafts.base import Loss
from specd.metrics import Stats
from specd.protocol.batch import Batch
from specd.train.checkpoint import Checkpoints, Identity, Position
from specd.train.journal import StepRecord, read
from specd.train.loop import train

HIDDEN = 6


class Tiny:
    """Regression of a token's state on its id; predicts nothing where the loss mask is empty."""

    def __init__(self, poison: int | None = None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.module = torch.nn.Sequential(torch.nn.Linear(HIDDEN, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.poison = poison
        self.trained: list[tuple[int, int]] = []

    def warm_up(self, dtype: torch.dtype) -> None:
        raise NotImplementedError

    def facts(self) -> dict[str, str]:
        raise NotImplementedError

    def export(self, path: Path, files: Any = None) -> None:
        raise NotImplementedError

    def loss(self, delivery: Any) -> Loss:
        batch: Batch = delivery.batch
        self.trained.append((batch.epoch, batch.index))
        mask = torch.from_numpy(batch.loss_mask)
        wanted = torch.from_numpy(batch.tokens).float() / 50
        error = (self.module(delivery.taps.flatten(1))[:, 0] - wanted)[mask]
        total = (error**2).sum()
        if batch.samples[0] == self.poison:
            total = total * float("nan")
        right = torch.stack([(error.abs() < 0.5).sum(), torch.zeros((), dtype=torch.long)])
        metrics = {"correct": right, "counted": torch.stack([mask.sum(), mask.sum() * 0]), "twice": right * 2.0}
        return Loss(total, mask.sum(), metrics)


class Plan:
    """`per_epoch` batches an epoch; batch i holds sample i, or as many as `size` says."""

    def __init__(self, epochs: int = 2, per_epoch: int = 10, size: int = 1, empty: tuple[int, ...] = ()) -> None:
        self.epochs, self.per_epoch, self.size, self.empty = epochs, per_epoch, size, empty

    @property
    def num_batches(self) -> int:
        return self.epochs * self.per_epoch

    def before(self, epoch: int, index: int) -> int:
        return epoch * self.per_epoch + index

    def places(self, epoch: int, index: int) -> Iterator[Place]:
        for number in range(epoch * self.per_epoch + index, self.num_batches):
            epoch, index = divmod(number, self.per_epoch)
            samples = tuple(range(index * self.size, (index + 1) * self.size))
            yield Place(epoch, index, samples, sum(3 + s % 4 for s in samples))

    def packed(self, places: Iterable[Place]) -> Iterator[Batch]:
        yield from map(self._pack, places)

    def _pack(self, place: Place) -> Batch:
        epoch, index, samples = place.epoch, place.index, place.samples
        tokens = np.concatenate([np.arange(3 + s % 4, dtype=np.int32) * 3 + s + epoch for s in samples])
        return Batch(
            tokens=tokens,
            lengths=np.array([3 + s % 4 for s in samples], dtype=np.int32),
            loss_mask=np.full(tokens.size, index not in self.empty),
            samples=samples,
            epoch=epoch,
            index=index,
        )


class Source:
    """States are a function of the token ids. `on_batch` is called before each delivery."""

    def __init__(self, on_batch: Callable[[Batch], None] = lambda batch: None, short: int = 0) -> None:
        self.on_batch, self.short = on_batch, short
        self.delivered = 0

    def stream(self, batches: Iterable[Batch]) -> Iterator[Any]:
        for batch in batches:
            if self.short and self.delivered == self.short:
                return
            self.on_batch(batch)
            self.delivered += 1
            angles = torch.from_numpy(batch.tokens).float()[:, None] * torch.arange(1, HIDDEN + 1) / 9
            yield SimpleNamespace(batch=batch, taps=angles.sin()[:, None, :], final=None)

    def stats(self) -> Stats:
        return Stats(busy_slots=1, num_slots=4, resubmitted=self.delivered)


CONFIG = TrainConfig(lr=0.02, weight_decay=0.01, accumulation=3, save_every=2, keep=2, warmup_ratio=0.1)


def run(
    directory: Path,
    config: TrainConfig = CONFIG,
    objective: Tiny | None = None,
    plan: Plan | None = None,
    source: Source | None = None,
    **options: Any,
) -> tuple[Tiny, Position]:
    torch.set_num_threads(1)
    objective = objective or Tiny()
    checkpoints = Checkpoints(
        directory / "checkpoints", Identity(target="t", settings={"train.lr": config.lr}), config.keep
    )
    position = train(
        config, objective, plan or Plan(), source or Source(), checkpoints, directory / "metrics.jsonl", **options
    )
    return objective, position


def records(directory: Path) -> list[StepRecord]:
    return read(directory / "metrics.jsonl")


def curve(directory: Path) -> list[tuple[float | None, float | None, float]]:
    return [(record.loss, record.grad_norm, record.lr) for record in records(directory)]


def weights(objective: Tiny) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in objective.module.parameters()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@contextmanager
def full_disk() -> Iterator[Callable[[int], None]]:
    """A function that sets how many bytes a file may have, 0 for no limit; at the end there is none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or soft, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
