"""Held-out rows: which they are, when they are measured, and that training does not depend on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs

import runs
from groups import together
from runs import CONFIG, Plan, Source, Tiny, curve, run, same, weights
from specd.config.settings import RunConfig, TrainConfig, ValidationConfig
from specd.data.batching import BatchPlan, Place
from specd.drafts.base import Loss
from specd.errors import ConfigError, SpecdError
from specd.protocol.batch import Batch
from specd.train.checkpoint import Checkpoints, Identity
from specd.train.distributed import Ranks
from specd.train.loop import train
from specd.train.measurement import Measurement, read
from specd.train.validation import Validation, held_out, planned

HELD = tuple(Place(0, number, (number,), 3 + number % 4) for number in (20, 21, 22))


class Watched(Tiny):
    """Draws from the global generator, as a draft should not; `losses` of held-out batches replace its own."""

    def __init__(self, losses: Iterator[float] | None = None) -> None:
        super().__init__()
        self.losses = losses
        self.seen: list[int] = []

    def loss(self, delivery: Any) -> Loss:
        found = super().loss(delivery)
        noise = torch.rand(()) * 0.01
        if delivery.batch.samples[0] < 20:
            return found._replace(sum=found.sum * (1 + noise))
        self.seen.append(delivery.batch.samples[0])
        return found._replace(sum=found.weight * next(self.losses)) if self.losses else found


def measured(directory: Path) -> list[Measurement]:
    return read(directory / "validation.jsonl")


def held_out_run(directory: Path, every: int, patience: int = 0, **more: Any) -> Tiny:
    """7 steps over 20 batches, with three held-out ones."""
    checks = Validation(HELD, every, patience, directory / "validation.jsonl")
    objective, _ = run(directory, more.pop("config", CONFIG), more.pop("objective", None), validation=checks, **more)
    return objective


def values(found: list[Measurement]) -> list[Measurement]:
    """Without what a clock says."""
    return [structs.replace(one, seconds=0.0) for one in found]


def test_training_is_the_same_to_the_bit_whether_held_out_rows_are_measured(tmp_path: Path) -> None:
    torch.manual_seed(5)
    plain, _ = run(tmp_path / "plain", objective=Watched())
    torch.manual_seed(5)
    watched = Watched()
    held_out_run(tmp_path / "watched", 2, objective=watched)
    assert curve(tmp_path / "watched") == curve(tmp_path / "plain")
    assert same(weights(watched), weights(plain))
    assert watched.seen == [20, 21, 22] * 4
    found = measured(tmp_path / "watched")
    assert [one.step for one in found] == [2, 4, 6, 7], "every 2 steps, and at the end"
    waits = [record.resubmitted for record in runs.records(tmp_path / "watched")]
    assert waits == [3] * 6 + [2], "what is spent on held-out batches is none of a step's"


def test_a_measurement_is_the_mean_over_all_held_out_predictions(tmp_path: Path) -> None:
    objective = held_out_run(tmp_path, 7)
    (found,) = measured(tmp_path)
    total = weight = 0.0
    source = Source()
    for delivery in source.stream(Plan().packed(HELD)):
        loss = objective.loss(delivery)
        total, weight = total + float(loss.sum.detach()), weight + float(loss.weight)
    assert found.loss == pytest.approx(total / weight, rel=1e-6)
    assert (found.weight, found.tokens) == (weight, 3 + 4 + 5)
    assert found.teacher_forced_by_offset[1] is None
    assert found.by_offset["twice"][0] == 2 * (found.teacher_forced_by_offset[0] or 0.0)
    assert (found.best, found.best_step) == (True, 7)


def test_the_best_checkpoint_stays_and_the_run_ends_early_when_asked(tmp_path: Path) -> None:
    losses = [3.0, 2.0, math.nan, 2.5, 2.25]
    objective = Watched(each for each in losses for _ in HELD)
    config = structs.replace(CONFIG, save_every=1, keep=1)
    held_out_run(tmp_path, 1, patience=3, objective=objective, config=config)
    found = measured(tmp_path)
    assert [one.loss for one in found] == [3.0, 2.0, None, 2.5, 2.25]
    assert [(one.best, one.best_step, one.waited) for one in found] == [
        (True, 1, 0), (True, 2, 0), (False, 2, 1), (False, 2, 2), (False, 2, 3)
    ]  # fmt: skip
    assert len(runs.records(tmp_path)) == 5, "of 7"
    best = Checkpoints(tmp_path / "checkpoints", Identity(target="t", settings={"train.lr": config.lr})).best()
    assert best is not None
    assert best.name == "step-00000002"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "best", "step-00000002", "step-00000005",
    ]  # fmt: skip
    source = Source()
    held_out_run(tmp_path, 1, patience=3, objective=Watched(), config=config, source=source, resume=True)
    assert (source.delivered, len(runs.records(tmp_path))) == (0, 5), "a run that has ended stays so"


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize("at", [5, 8, 15, 22])
def test_a_resumed_run_measures_what_is_missing_and_nothing_twice(tmp_path: Path, at: int) -> None:
    whole = held_out_run(tmp_path / "whole", 2)
    source = Source()

    def kill(batch: Batch) -> None:
        if source.delivered == at:
            raise Killed

    source.on_batch = kill
    with pytest.raises(Killed):
        held_out_run(tmp_path / "cut", 2, source=source)
    again = bool(list((tmp_path / "cut" / "checkpoints").glob("step-*")))
    resumed = held_out_run(tmp_path / "cut", 2, resume=again)
    assert values(measured(tmp_path / "cut")) == values(measured(tmp_path / "whole"))
    assert same(weights(resumed), weights(whole))
    assert (tmp_path / "cut" / "checkpoints" / "best").readlink() == (
        tmp_path / "whole" / "checkpoints" / "best"
    ).readlink()


def test_an_interrupted_measurement_is_made_again(tmp_path: Path) -> None:
    held_out_run(tmp_path / "whole", 3)

    def interrupt(batch: Batch) -> None:
        if batch.samples[0] == 21:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        held_out_run(tmp_path / "cut", 3, source=Source(interrupt))
    assert not measured(tmp_path / "cut")
    with open(tmp_path / "cut" / "validation.jsonl", "wb") as file:
        file.write(b'{"step": 3, "lo')
    held_out_run(tmp_path / "cut", 3, resume=True)
    assert values(measured(tmp_path / "cut")) == values(measured(tmp_path / "whole"))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_a_stream_that_ends_within_held_out_batches_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpecdError, match="the stream ended 2 held-out batches early, after step 2"):
        held_out_run(tmp_path, 2, source=Source(short=7))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("patience", [0, 1])
def test_ranks_share_held_out_batches_and_end_together(tmp_path: Path, size: int, patience: int) -> None:
    """With patience, under a learning rate that changes nothing."""
    config = TrainConfig(lr=1e-30 if patience else 0.02, accumulation=3, save_every=2, keep=9)
    held_out_run(tmp_path / "alone", 2, patience, config=config, objective=Doubled())

    def work(ranks: Ranks) -> tuple[int, list[int]]:
        torch.set_num_threads(1)
        where = tmp_path / "many" if ranks.leads else tmp_path / "nothing"
        objective = Doubled()
        checks = Validation(HELD, 2, patience, where / "validation.jsonl")
        checkpoints = Checkpoints(where / "checkpoints", Identity(target="t", settings={}), config.keep)
        end = train(
            config, objective, Plan(), Source(), checkpoints, where / "metrics.jsonl", ranks=ranks, validation=checks
        )
        assert ranks.leads or not where.exists(), "rank 0 alone writes"
        return end.step, objective.seen

    for rank, found in enumerate(together(size, work)):
        mine = [*range(20 + rank, 23, size)]
        assert found == ((4, mine * 2) if patience else (7, mine * 4))
    for ours, theirs in zip(measured(tmp_path / "many"), measured(tmp_path / "alone"), strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-12)
        assert (ours.step, ours.best, ours.teacher_forced_by_offset) == (
            theirs.step, theirs.best, theirs.teacher_forced_by_offset,
        )  # fmt: skip


class Doubled(Watched):
    """In float64, without noise."""

    def __init__(self) -> None:
        super().__init__()
        self.module.double()

    def loss(self, delivery: Any) -> Loss:
        delivery.taps = delivery.taps.double()
        if delivery.batch.samples[0] >= 20:
            self.seen.append(delivery.batch.samples[0])
        return Tiny.loss(self, delivery)


class Rows:
    """1,500 rows of ten tokens, every tenth in two samples."""

    rows = np.sort(np.concatenate([np.arange(1500), np.arange(0, 1500, 10)]))
    lengths = np.full(rows.size, 10)

    def held_out(self, share: float, most: int, seed: int) -> Any:
        from specd.data.dataset import Dataset

        return Dataset.held_out(SimpleNamespace(rows=self.rows), share, most, seed)  # type: ignore[arg-type]

    def plan_of(self, held: Any, data: Any, seed: int) -> BatchPlan:
        return BatchPlan(self.lengths, 100, 0, seed, held.astype(float))


def test_two_percent_are_held_out_unless_that_is_next_to_nothing() -> None:
    rows: Any = Rows()
    settled, held = held_out(ValidationConfig(), rows, 0)
    assert (settled.share, held.rows) == (0.02, 30)
    assert set(rows.rows[held.samples]).isdisjoint(rows.rows[~held.samples]), "a row is held out with all its samples"
    again, other = (held_out(ValidationConfig(), rows, seed)[1] for seed in (0, 1))
    assert (again.samples == held.samples).all()
    assert (other.samples != held.samples).any()
    assert held_out(ValidationConfig(share=0.5), rows, 0)[1].rows == 500
    assert held_out(ValidationConfig(share=0.5, rows=7), rows, 0)[1].rows == 7
    few: Any = SimpleNamespace(rows=rows.rows[rows.rows < 1200], held_out=Few().held_out)
    settled, held = held_out(ValidationConfig(), few, 0)
    assert (settled.share, held.rows, held.count) == (0.0, 0, 0)
    with pytest.raises(ConfigError, match=r"validation\.share=0\.0001 of 1500 rows is none: expected at least one"):
        held_out(ValidationConfig(share=0.0001), rows, 0)


class Few(Rows):
    rows = Rows.rows[Rows.rows < 1200]


def test_left_to_specd_measuring_adds_two_percent_of_tokens(tmp_path: Path) -> None:
    rows: Any = Rows()
    run_config = RunConfig(
        method="x", train=TrainConfig(accumulation=2), validation=ValidationConfig(share=0.02, patience=4)
    )
    _, held = held_out(run_config.validation, rows, 0)
    plan = BatchPlan(rows.lengths, 100, 0, 0, np.where(held.samples, 0.0, 1.0))
    assert sorted(i for batch in plan.epoch(0) for i in batch) == np.flatnonzero(~held.samples).tolist()
    checks = planned(run_config, rows, held, plan, tmp_path / "v.jsonl")
    assert sorted(i for place in checks.places for i in place.samples) == np.flatnonzero(held.samples).tolist()
    trained = checks.every * 2 * 100
    assert 0.98 * checks.tokens <= 0.02 * trained <= 1.02 * checks.tokens + 4
    named = structs.replace(run_config, validation=structs.replace(run_config.validation, every=5))
    assert (planned(named, rows, held, plan, tmp_path / "v.jsonl").every, checks.patience) == (5, 4)
