"""The sums of a step over ranks: rows that are put back into the order of the plan, and what a record says of them."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch

from specd.drafts.base import Loss
from specd.errors import SpecdError
from specd.metrics import Stats
from specd.train.checkpoint import Position, RngStates
from specd.train.distributed import Ranks
from specd.train.journal import TrainedBatch
from specd.train.launcher import Launch
from specd.train.step import TOLD, Sums, Torn, UnloggedStep, Window, told_of
from step_records import record


class Told(Ranks):
    """Rank `rank` of some, which is handed the rows of the others instead of an exchange."""

    rows: ClassVar[dict[int, torch.Tensor]] = {}

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(Launch(rank, size), store=object())

    def gather(self, row: torch.Tensor, word: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.rows[self.rank] = row
        nothing = torch.zeros_like(row)
        return torch.stack([self.rows.get(rank, nothing) for rank in range(self.size)]), torch.tensor(True)


def loss_of(batch: int) -> Loss:
    counts = torch.tensor([float(batch), 1.0])
    metrics = {"sure": 2 * counts, "correct": counts, "counted": counts + 5}
    return Loss(torch.tensor(10.0 + batch), torch.tensor(1.0 + batch), metrics)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("batches", [5, 3, 1])
def test_sums_are_in_the_order_of_the_plan(size: int, batches: int) -> None:
    Told.rows = {}
    sums: Sums | None = None
    for rank in reversed(range(size)):  # rank 0 is the last, and has the rows of all
        ranks = Told(rank, size) if size > 1 else Ranks()
        window = Window("cpu")
        for batch in ranks.deal(range(batches)):
            window.add(loss_of(batch))
        assert window.num_counts in ((2, 0), (3, 2))
        told = told_of(Stats(target_wait_s=rank, resubmitted=2), work_s=1.0, step_s=1.0)
        sums = window.sums(ranks, 1, batches, accumulation=5, counts=(3, 2), told=told)
    assert sums is not None
    assert sums.losses.tolist() == [10.0 + batch for batch in range(batches)]
    assert sums.weights.tolist() == [1.0 + batch for batch in range(batches)]
    assert float(sums.weight) == sum(1.0 + batch for batch in range(batches))
    right = sum(range(batches))
    assert sums.counts.tolist() == [[right, batches], [right + 5 * batches, 6 * batches], [2 * right, 2 * batches]]
    if size > 1:
        assert sums.told is not None
        assert sums.told[:, 0].tolist() == [float(rank) for rank in range(size)]


def unlogged(losses: list[float], norm: float = 2.0, *, intact: bool = True) -> UnloggedStep:
    facts = record(
        step=4, batches=tuple(TrainedBatch(epoch=0, index=i, samples=(i,)) for i in range(len(losses))), step_s=2.5
    )
    told = torch.from_numpy(
        np.stack(
            [
                told_of(Stats(target_wait_s=0.5, forward_s=1.0, resubmitted=1), work_s=0.5, step_s=2.0),
                told_of(
                    Stats(wire_wait_s=0.5, forward_s=2.0, reconnects=2, shared=3, replayed=4), work_s=2.5, step_s=7.0
                ),
            ]
        )
    )
    sums = Sums(
        torch.tensor(losses).double(), torch.ones(len(losses)).double(), torch.ones(2, 3).double(), told,
        torch.tensor(intact),
    )  # fmt: skip
    return UnloggedStep(Window("cpu"), sums, torch.tensor(norm), facts, Position(step=4), RngStates.capture())


def test_a_record_has_means_of_what_else_is_measured() -> None:
    window = Window("cpu")
    window.add(loss_of(2))
    sums = window.sums(Ranks(), 1, 1, accumulation=1, counts=(3, 2), told=np.zeros(TOLD))
    facts = record(step=1, batches=(TrainedBatch(epoch=0, index=0, samples=(0,)),))
    found = UnloggedStep(window, sums, torch.tensor(1.0), facts, Position(step=1), RngStates.capture()).record()
    assert found.teacher_forced_by_offset == (2 / 7, 1 / 6)
    assert found.by_offset == {"sure": (4 / 7, 2 / 6)}


def test_a_record_tells_of_all_ranks() -> None:
    found = unlogged([1.0, 3.0]).record()
    assert (found.loss, found.grad_norm, found.weight, found.ranks) == (2.0, 2.0, 2.0, 2)
    assert (found.target_wait_s, found.wire_wait_s, found.train_s) == (0.25, 0.25, 1.5)
    assert found.step_s == 2.0, "the clock of rank 0, on every rank"
    assert (found.forward_s, found.resubmitted, found.reconnects) == (3.0, 1, 2)
    assert (found.shared, found.replayed) == (3, 4)
    assert found.slowest == pytest.approx(0.5), "3 s, and 2 in the mean"


def test_a_torn_step_has_no_record_and_says_nothing_of_its_garbage() -> None:
    with pytest.raises(Torn):
        unlogged([float("nan"), 1.0], intact=False).record()
    with pytest.raises(SpecdError, match=r"step 4: the loss is nan in batch 1 of epoch 0 \(samples 1\).*of step 3"):
        unlogged([1.0, float("nan")]).record()
    with pytest.raises(SpecdError, match="step 4: the gradient norm is inf in batch 0"):
        unlogged([1.0], norm=float("inf")).record()
