"""One optimizer step over all ranks: the sums of its batches, and its record once the device is done with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from specd.data.batching import Place
from specd.drafts.base import Loss
from specd.drafts.device import to_device
from specd.errors import SpecdError
from specd.memory.streams import reached
from specd.metrics import Stats
from specd.train.checkpoint import Position, RngStates
from specd.train.distributed import Ranks
from specd.train.journal import StepRecord, TrainedBatch
from specd.train.measurement import means
from specd.train.stopwatch import Stopwatch

TOLD = 9
"""What a rank tells of its own time: waits for target and wire, forwards, its work, the step, resubmitted, reconnects,
shared, replayed."""


class Torn(Exception):
    """The exchange of a step was not whole: neither it nor any later step has changed a weight."""


class Sums:
    """The sums of a step's batches over all ranks, on the device.

    losses, weights: of each batch, float64 [batches], in the order of the plan. counts: correct and counted
    predictions, and what else the draft measures of them, float64 [2 or more, K]. told: of each rank, float64
    [W, TOLD]; none of a rank alone. intact: whether all of it, and the gradients, came whole.
    """

    __slots__ = ("counts", "intact", "losses", "told", "weights")

    def __init__(
        self,
        losses: torch.Tensor,
        weights: torch.Tensor,
        counts: torch.Tensor,
        told: torch.Tensor | None = None,
        intact: torch.Tensor | None = None,
    ) -> None:
        self.losses, self.weights, self.counts, self.told, self.intact = losses, weights, counts, told, intact

    @property
    def weight(self) -> torch.Tensor:
        """Total weight, a float64 scalar."""
        return self.weights.sum()


class Window:
    """The batches of one step that this rank trains.

    watch: times its work on the device. measured: names of what the draft measures beside correct and counted
    predictions; none of no batch.
    """

    __slots__ = ("_counts", "_device", "_losses", "_weights", "measured", "watch")

    def __init__(self, device: str) -> None:
        self.watch = Stopwatch(device)
        self.measured: tuple[str, ...] = ()
        self._device = device
        self._losses: list[torch.Tensor] = []
        self._weights: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []

    def add(self, loss: Loss) -> None:
        """Accumulate a batch's gradients."""
        if loss.sum.requires_grad:
            loss.sum.backward()  # type: ignore[no-untyped-call]
        self.look(loss)

    def look(self, loss: Loss) -> None:
        """Take a batch's numbers alone: of one that is not trained."""
        self._losses.append(loss.sum.detach().double())
        self._weights.append(loss.weight.detach().double())
        self.measured = tuple(sorted(loss.metrics.keys() - {"correct", "counted"}))
        names = "correct", "counted", *self.measured
        self._counts.append(torch.stack([loss.metrics[name].double() for name in names]))

    @property
    def num_counts(self) -> tuple[int, int]:
        """How many counts there are, and at how many offsets; 0 of no batch."""
        return (self._counts[0].shape[0], self._counts[0].shape[1]) if self._counts else (2, 0)

    def sums(
        self, ranks: Ranks, step: int, batches: int, accumulation: int, counts: Sequence[int], told: NDArray[np.float64]
    ) -> Sums:
        """The sums over all ranks. step: the number of this one, from 1. batches: of all ranks. counts: `num_counts`.

        accumulation: batches of a step that is not the last. told: of `told_of`.
        """
        if ranks.size == 1:
            return Sums(torch.stack(self._losses), torch.stack(self._weights), torch.stack(self._counts).sum(0))
        most = -(-accumulation // ranks.size)
        row = torch.zeros(2 * most + math.prod(counts) + TOLD, dtype=torch.float64, device=self._device)
        if self._losses:
            row[: len(self._losses)] = torch.stack(self._losses)
            row[most : most + len(self._weights)] = torch.stack(self._weights)
            row[2 * most : -TOLD] = torch.stack(self._counts).sum(0).flatten()
        row[-TOLD:] = to_device(told, torch.device(self._device))
        rows, intact = ranks.gather(row, step)
        # Batch k is number k // W of rank k % W.
        losses, weights = (rows[:, at : at + most].T.flatten()[:batches] for at in (0, most))
        counted = rows[:, 2 * most : -TOLD].sum(0).view(*counts)
        return Sums(losses, weights, counted, rows[:, -TOLD:], intact)


class UnloggedStep:
    """An optimizer step that is not logged yet: host facts, and its device values in an asynchronous copy.

    position, rng: where the run stands once it is done.
    """

    __slots__ = ("_copied", "_measured", "_num_counts", "_shapes", "_values", "_watch", "facts", "position", "rng")

    def __init__(
        self, window: Window, sums: Sums, norm: torch.Tensor, facts: StepRecord, position: Position, rng: RngStates
    ) -> None:
        self._watch, self.facts, self.position, self.rng = window.watch, facts, position, rng
        self._measured, self._num_counts = window.measured, sums.counts.shape[0]
        intact = torch.ones_like(sums.weight) if sums.intact is None else sums.intact.double()
        parts = [sums.weight[None], norm.double()[None], intact[None], sums.losses, sums.counts.flatten()]
        parts += [] if sums.told is None else [sums.told.flatten()]
        self._shapes = [part.numel() for part in parts]
        values = torch.cat(parts)
        self._values = values
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        self._copied = reached(str(values.device))

    def record(self) -> StepRecord:
        """The full record; waits until the step is done. Raises Torn, and SpecdError if it was not finite."""
        if self._copied is not None:
            self._copied.synchronize()
        (weight,), (norm,), (intact,), losses, counts, *told = (
            part.tolist() for part in torch.split(self._values, self._shapes)
        )
        if not intact:
            raise Torn
        correct, counted, *measured = np.array(counts).reshape(self._num_counts, -1).tolist()
        for batch, loss in zip(self.facts.batches, losses, strict=True):
            if not math.isfinite(loss):
                raise _not_finite(self.facts.step, f"the loss is {loss}", [batch])
        if not math.isfinite(norm):
            raise _not_finite(self.facts.step, f"the gradient norm is {norm}", self.facts.batches)
        record = msgspec.structs.replace(
            self.facts,
            draft_s=self._watch.seconds(),
            loss=sum(losses) / weight if weight else None,
            grad_norm=norm,
            weight=weight,
            teacher_forced_accuracy=sum(correct) / sum(counted) if sum(counted) else None,
            teacher_forced_by_offset=means(correct, counted),
            # A rank without a batch has no names for them, and no journal.
            by_offset={name: means(sums, counted) for name, sums in zip(self._measured, measured, strict=False)},
        )
        return _of_all(record, told[0]) if told else record


def host_facts(step: int, places: Sequence[Place], rate: float, step_s: float, stats: Stats) -> StepRecord:
    """The host's part of a record: what was trained, and where time went. stats: of these `step_s` seconds alone."""
    return StepRecord(
        step=step,
        epoch=places[-1].epoch,
        batches=tuple(TrainedBatch(epoch=at.epoch, index=at.index, samples=at.samples) for at in places),
        loss=None,
        teacher_forced_accuracy=None,
        teacher_forced_by_offset=(),
        lr=rate,
        grad_norm=None,
        weight=0.0,
        tokens=sum(at.tokens for at in places),
        step_s=step_s,
        target_wait_s=stats.target_wait_s,
        wire_wait_s=stats.wire_wait_s,
        train_s=max(0.0, step_s - stats.target_wait_s - stats.wire_wait_s),
        forward_s=stats.forward_s,
        busy_slots=stats.busy_slots,
        num_slots=stats.num_slots,
        resubmitted=stats.resubmitted,
        reconnects=stats.reconnects,
        shared=stats.shared,
        replayed=stats.replayed,
    )


def told_of(stats: Stats, work_s: float, step_s: float) -> NDArray[np.float64]:
    """What a rank tells the others of its own time in a step. work_s: of its device. step_s: of the whole step."""
    waits = stats.target_wait_s, stats.wire_wait_s
    counts = stats.resubmitted, stats.reconnects, stats.shared, stats.replayed
    return np.array([*waits, stats.forward_s, sum(waits) + work_s, step_s, *counts], np.float64)


def _of_all(record: StepRecord, told: Sequence[float]) -> StepRecord:
    """The record with means and sums over all ranks, and the time of rank 0. told: of each, TOLD numbers."""
    target, wire, forward, busy, step, *counts = (list(told[at::TOLD]) for at in range(TOLD))
    resubmitted, reconnects, shared, replayed = (int(sum(count)) for count in counts)
    size = len(target)
    waits = sum(target) / size, sum(wire) / size
    mean = sum(busy) / size
    return msgspec.structs.replace(
        record,
        ranks=size,
        slowest=max(busy) / mean - 1 if mean else 0.0,
        step_s=step[0],
        target_wait_s=waits[0],
        wire_wait_s=waits[1],
        train_s=max(0.0, step[0] - sum(waits)),
        forward_s=sum(forward),
        resubmitted=resubmitted,
        reconnects=reconnects,
        shared=shared,
        replayed=replayed,
    )


def _not_finite(step: int, what: str, batches: Sequence[TrainedBatch]) -> SpecdError:
    return SpecdError(
        f"step {step}: {what} in {'; '.join(map(str, batches))}; the weights are still those of step {step - 1}: look "
        f"at these samples with `specd data show`, lower train.lr, or train in float32"
    )
