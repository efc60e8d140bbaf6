"""The training loop: deliveries in, optimizer steps out, for any draft.

An optimizer step takes `accumulation` batches in a row, across the ends of epochs; only the last step of a run may take
fewer. Gradients of loss sums are added up and divided once by the weight of the whole step, so the result does not
depend on how the step was cut into batches. The position in the data moves when a step is done and never before.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec
import torch

from specd.config.settings import TrainConfig
from specd.drafts.base import Loss, Objective
from specd.errors import BatchError, SpecdError
from specd.memory.streams import reached
from specd.protocol.batch import Batch
from specd.train.checkpoint import Checkpoints, Position, RngStates
from specd.train.interrupt import Interrupt
from specd.train.journal import Journal, Sink, StepRecord, TrainedBatch
from specd.train.optimizer import apply_gradients, learning_rate, make_optimizer, total_steps
from specd.train.stopwatch import Stopwatch

if TYPE_CHECKING:
    from specd.metrics import Stats
    from specd.protocol.batch import Delivery

logger = logging.getLogger(__name__)


class Feed(Protocol):
    """The batches of all epochs of a run, in order."""

    @property
    def num_batches(self) -> int:
        """How many batches there are."""
        ...

    def before(self, epoch: int, index: int) -> int:
        """How many batches there are before number `index` of `epoch`."""
        ...

    def remaining(self, epoch: int, index: int) -> Iterator[Batch]:
        """All batches from number `index` of `epoch` on; `index` may be the length of that epoch."""
        ...


class StateSource(Protocol):
    """A source of states, such as a Subscriber."""

    def stream(self, batches: Iterable[Batch]) -> Iterator[Delivery]:
        """One delivery for each batch, in order; its tensors are valid until the next one is requested."""
        ...

    def stats(self) -> Stats:
        """Counters since the start."""
        ...


class _StepBatches:
    """The batches of one optimizer step and their sums, which stay on the device until they are logged.

    watch: times its work on the device.
    """

    __slots__ = ("_counts", "_losses", "_weights", "batches", "tokens", "watch")

    def __init__(self, device: str) -> None:
        self.watch = Stopwatch(device)
        self.batches: list[TrainedBatch] = []
        self.tokens = 0
        self._losses: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []

    def add(self, batch: Batch, loss: Loss) -> None:
        """Accumulate a batch's gradients."""
        if loss.sum.requires_grad:
            loss.sum.backward()  # type: ignore[no-untyped-call]
        self.batches.append(TrainedBatch(epoch=batch.epoch, index=batch.index, samples=batch.samples))
        self.tokens += batch.num_tokens
        self._losses.append(loss.sum.detach().double())
        self._weights.append(loss.weight.detach().double())
        self._counts.append(torch.stack([loss.metrics["correct"], loss.metrics["counted"]]).double())

    @property
    def weight(self) -> torch.Tensor:
        """Total weight, a float64 scalar."""
        return torch.stack(self._weights).sum()

    @property
    def losses(self) -> torch.Tensor:
        """Loss sum of each batch, float64 [batches]."""
        return torch.stack(self._losses)

    @property
    def counts(self) -> torch.Tensor:
        """Correct and counted predictions, float64 [2, K]."""
        return torch.stack(self._counts).sum(0)


class _UnloggedStep:
    """An optimizer step that is not logged yet: host facts, and its device values in an asynchronous copy."""

    __slots__ = ("_copied", "_values", "facts", "window")

    def __init__(self, window: _StepBatches, norm: torch.Tensor, facts: StepRecord) -> None:
        self.window = window
        self.facts = facts
        values = torch.cat([window.weight[None], norm.double()[None], window.losses, window.counts.flatten()])
        self._values = values
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        self._copied = reached(str(values.device))

    def record(self) -> StepRecord:
        """The full record; waits until the step is done. Raises SpecdError if it was not finite."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._values.tolist()
        weight, norm = values[0], values[1]
        losses = values[2 : 2 + len(self.window.batches)]
        counts = values[2 + len(losses) :]
        correct, counted = counts[: len(counts) // 2], counts[len(counts) // 2 :]
        for batch, loss in zip(self.window.batches, losses, strict=True):
            if not math.isfinite(loss):
                raise _not_finite(self.facts.step, f"the loss is {loss}", [batch])
        if not math.isfinite(norm):
            raise _not_finite(self.facts.step, f"the gradient norm is {norm}", self.window.batches)
        return msgspec.structs.replace(
            self.facts,
            draft_s=self.window.watch.seconds(),
            loss=sum(losses) / weight if weight else None,
            grad_norm=norm,
            weight=weight,
            teacher_forced_accuracy=sum(correct) / sum(counted) if sum(counted) else None,
            teacher_forced_by_offset=tuple(
                right / of if of else None for right, of in zip(correct, counted, strict=True)
            ),
        )


class _Run:
    """The mutable state of one call of `train`."""

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        source: StateSource,
        checkpoints: Checkpoints,
        journal: Journal,
        sinks: Sequence[Sink],
        optimizer: torch.optim.AdamW,
        position: Position,
        steps: int,
    ) -> None:
        self.config, self.steps, self.position = config, steps, position
        self.module = objective.module
        self.source, self.checkpoints, self.journal, self.sinks = source, checkpoints, journal, sinks
        self.optimizer = optimizer
        self.rng = RngStates.capture()
        self.savable = True  # weights, moments, position and records are of the same step
        self._pending: list[_UnloggedStep] = []
        self.device = str(optimizer.param_groups[0]["params"][0].device)
        # 1 from the first non-finite step on: no later step changes a weight, though the host sees it only when it
        # logs.
        self._halted = torch.zeros((), device=self.device)
        self._stats = source.stats()
        self._mark = time.perf_counter()

    def step(self, window: _StepBatches) -> None:
        """One optimizer step over the window, then log and save as configured."""
        rate = learning_rate(self.config, self.position.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.savable = False
        with window.watch.running():
            norm, self._halted = apply_gradients(
                self.optimizer, window.weight.float(), window.losses, self.config.clip, self._halted
            )
        last = window.batches[-1]
        self.position = Position(step=self.position.step + 1, epoch=last.epoch, index=last.index + 1)
        self.rng = RngStates.capture()
        self._pending.append(_UnloggedStep(window, norm, self._facts(window, rate)))
        self.savable = True
        step = self.position.step
        if step % self.config.log_every == 0 or step == self.steps:
            # On a GPU the newest step stays pending: the device has work while the host waits and makes the next batch.
            self._show(self._log(keep=1 if self._halted.is_cuda and step < self.steps else 0))
        if step == self.steps or (self.config.save_every and step % self.config.save_every == 0):
            self.save()

    def save(self) -> None:
        """Checkpoint the last optimizer step, if there is one and it is not saved yet."""
        if self.position.step:
            records = self._log()
            self.journal.sync()
            path = self.checkpoints.save(self.position, self.module, self.optimizer, self.rng)
            self._show(records)
            logger.info("checkpoint of step %d: %s", self.position.step, path)

    def _log(self, keep: int = 0) -> list[StepRecord]:
        """Journal all pending records but the newest `keep`: the only place that waits for the device."""
        records: list[StepRecord] = []
        while len(self._pending) > keep:
            try:
                records.append(self._pending[0].record())
            except SpecdError:
                self.savable = False
                raise
            self.journal.append(records[-1])
            del self._pending[0]
        return records

    def _show(self, records: Sequence[StepRecord]) -> None:
        for record in records:
            for sink in self.sinks:
                sink.step(record)

    def _facts(self, window: _StepBatches, rate: float) -> StepRecord:
        """The host's part of a record: what was trained, and where the time since the last step went."""
        now, total = time.perf_counter(), self.source.stats()
        wall, stats = now - self._mark, total.difference(self._stats)
        self._mark, self._stats = now, total
        return StepRecord(
            step=self.position.step,
            epoch=window.batches[-1].epoch,
            batches=tuple(window.batches),
            loss=None,
            teacher_forced_accuracy=None,
            teacher_forced_by_offset=(),
            lr=rate,
            grad_norm=None,
            weight=0.0,
            tokens=window.tokens,
            step_s=wall,
            target_wait_s=stats.target_wait_s,
            wire_wait_s=stats.wire_wait_s,
            train_s=max(0.0, wall - stats.target_wait_s - stats.wire_wait_s),
            forward_s=stats.forward_s,
            busy_slots=stats.busy_slots,
            num_slots=stats.num_slots,
            resubmitted=stats.resubmitted,
            reconnects=stats.reconnects,
        )


def train(
    config: TrainConfig,
    objective: Objective,
    feed: Feed,
    source: StateSource,
    checkpoints: Checkpoints,
    journal: Path,
    *,
    sinks: Sequence[Sink] = (),
    interrupt: Interrupt | None = None,
    resume: bool = False,
) -> Position:
    """Train to the end, from the start or from the newest checkpoint; returns the last position.

    journal: path of the step records. On a SpecdError (running out of GPU memory becomes one) or a KeyboardInterrupt
    the last optimizer step is checkpointed, unless the error is a non-finite loss or gradient, which no weight has
    seen, or came between the weights and the position of a step.
    """
    interrupt = interrupt or Interrupt()
    optimizer = make_optimizer(objective.module, config)
    position = Position()
    if resume:
        position = checkpoints.restore(checkpoints.latest(), objective.module, optimizer)
        logger.info("resuming at step %d", position.step)
    batches = feed.num_batches
    trained = feed.before(position.epoch, position.index)
    steps = total_steps(config, batches, position.step, trained)
    left = min(batches - trained, (steps - position.step) * config.accumulation)
    with Journal(journal, position.step) as lines:
        run = _Run(config, objective, source, checkpoints, lines, sinks, optimizer, position, steps)
        try:
            window = _StepBatches(run.device)
            for delivery in source.stream(islice(feed.remaining(position.epoch, position.index), max(0, left))):
                try:
                    with window.watch.running():
                        window.add(delivery.batch, objective.loss(delivery))
                    left -= 1
                    if len(window.batches) == config.accumulation or not left:
                        with interrupt.shield():
                            run.step(window)
                        window = _StepBatches(run.device)
                except torch.OutOfMemoryError as error:
                    what = _no_memory(run.position.step + 1, delivery.batch)
                    raise out_of_memory(what, error, "continue with --resume where more is free") from None
            if left > 0:
                raise BatchError(
                    f"the stream ended {left} batches early, after step {run.position.step}: plan and source disagree"
                )
        except (KeyboardInterrupt, SpecdError):
            if run.savable:
                with interrupt.shield():
                    run.save()
            raise
        return run.position


def _not_finite(step: int, what: str, batches: Sequence[TrainedBatch]) -> SpecdError:
    return SpecdError(
        f"step {step}: {what} in {'; '.join(map(str, batches))}; the weights are still those of step {step - 1}: look "
        f"at these samples with `specd data show`, lower train.lr, or train in float32"
    )


def out_of_memory(what: str, error: torch.OutOfMemoryError, remedy: str) -> SpecdError:
    """The error of a run that needs more memory than there is. what: it is missing for. remedy: for the same run."""
    return SpecdError(
        f"{what}: {error}; {remedy}, or start a new run with a limit in data.max_batch_sequences, a smaller "
        f"data.batch_tokens or a smaller draft"
    )


def _no_memory(step: int, batch: Batch) -> str:
    return (
        f"step {step}: no memory left for batch {batch.index} of epoch {batch.epoch} ({batch.lengths.size} sequences, "
        f"{batch.num_tokens} tokens, {int(batch.loss_mask.sum())} of them labels)"
    )
