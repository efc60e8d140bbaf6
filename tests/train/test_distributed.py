"""What ranks exchange, and that a run does not depend on how many there are; as threads of one process, over gloo."""

from __future__ import annotations

import threading
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

import runs
from groups import connection, new_store, on_threads, together
from specd.config.settings import TrainConfig
from specd.drafts.base import Loss
from specd.errors import ConfigError, DataError, PeerError, SpecdError
from specd.protocol.batch import Batch
from specd.train.checkpoint import Checkpoints, Identity, Position
from specd.train.distributed import Ranks
from specd.train.journal import StepRecord, read
from specd.train.launcher import Launch
from specd.train.loop import train

CONFIG = TrainConfig(lr=0.02, weight_decay=0.01, accumulation=4, save_every=3, keep=9, warmup_ratio=0.1)
PLAN = runs.Plan(epochs=3, per_epoch=11, empty=(1, 4, 5, 6, 7))  # 33 batches: a step without weight, a last one of 1


class Precise(runs.Tiny):
    """In float64, and with a graph for each batch that has labels only."""

    def __init__(self, poison: int | None = None) -> None:
        super().__init__(poison)
        self.module.double()

    def loss(self, delivery: Any) -> Loss:
        delivery.taps = delivery.taps.double()
        loss = super().loss(delivery)
        return loss if int(loss.weight) else loss._replace(sum=loss.sum.detach())


def trained(
    directory: Path, size: int, config: TrainConfig = CONFIG, *, resume: bool = False, **more: Any
) -> list[Any]:
    """Each rank's objective, or what it raised; rank 0 writes in `directory`."""

    def work(ranks: Ranks) -> Precise:
        return one(directory, ranks, config, resume=resume, **more)

    return [work(Ranks())] if size == 1 else together(size, work)


def one(
    directory: Path,
    ranks: Ranks,
    config: TrainConfig = CONFIG,
    *,
    resume: bool = False,
    source: Any = None,
    objective: Precise | None = None,
) -> Precise:
    torch.set_num_threads(1)
    objective = objective or Precise()
    where = directory if ranks.leads else directory / "nothing"
    checkpoints = Checkpoints(where / "checkpoints", Identity(target="t", settings={}), config.keep)
    train(
        config, objective, PLAN, source(ranks) if source else runs.Source(), checkpoints, where / "metrics.jsonl",
        resume=resume, ranks=ranks,
    )  # fmt: skip
    assert ranks.leads or not where.exists(), "rank 0 alone writes"
    return objective


def records(directory: Path) -> list[StepRecord]:
    return read(directory / "metrics.jsonl")


def assert_alike(found: list[StepRecord], expected: list[StepRecord]) -> None:
    """The same batches in the same steps, with losses equal but for the rounding of float64."""
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("step", "epoch", "batches", "weight", "tokens", "lr", "teacher_forced_by_offset"):
            assert getattr(mine, name) == getattr(theirs, name), name
        for name in ("loss", "grad_norm"):
            one, other = getattr(mine, name), getattr(theirs, name)
            assert one == other if other is None else one == pytest.approx(other, rel=1e-12), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[StepRecord]:
    """The steps of a run in one process."""
    directory = tmp_path_factory.mktemp("alone")
    trained(directory, 1)
    found = records(directory)
    assert [len(record.batches) for record in found] == [4] * 8 + [1]
    assert any(record.loss is None for record in found)
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_ranks_trains_the_same(tmp_path: Path, alone: list[StepRecord], size: int) -> None:
    first, *others = trained(tmp_path, size)
    assert not isinstance(first, BaseException), first
    assert_alike(records(tmp_path), alone)
    dealt = [objective.trained for objective in (first, *others)]
    planned = [(batch.epoch, batch.index) for record in alone for batch in record.batches]
    assert sorted(chain.from_iterable(dealt)) == planned
    for other in others:
        assert runs.same(runs.weights(first), runs.weights(other)), "to the bit"
    assert {record.ranks for record in records(tmp_path)} == {size}
    assert sum(record.resubmitted for record in records(tmp_path)) == 33, "a sum over ranks"


def test_a_run_goes_on_with_any_number_of_ranks(tmp_path: Path, alone: list[StepRecord]) -> None:
    """Only rank 0 sees the checkpoint; it is interrupted twice, and others in mid-step."""

    class Until(runs.Source):
        def __init__(self, ranks: Ranks, last: int) -> None:
            super().__init__(lambda batch: self.stop(batch))
            self.ranks, self.last = ranks, last

        def stop(self, batch: Batch) -> None:
            if batch.epoch * 11 + batch.index >= self.last and self.ranks.leads:
                raise KeyboardInterrupt

    for size, last in ((2, 9), (3, 22)):
        found = trained(tmp_path, size, resume=size > 2, source=lambda ranks, last=last: Until(ranks, last))
        assert isinstance(found[0], KeyboardInterrupt)
        assert all(isinstance(error, PeerError) and error.said and error.interrupted for error in found[1:])
        assert len(records(tmp_path)) == last // 4
    trained(tmp_path, 1, resume=True)
    assert_alike(records(tmp_path), alone)


def test_the_same_number_of_ranks_gives_the_same_bits(tmp_path: Path) -> None:
    one, two = (trained(tmp_path / name, 3)[0] for name in "ab")
    assert runs.same(runs.weights(one), runs.weights(two))
    assert [record.loss for record in records(tmp_path / "a")] == [record.loss for record in records(tmp_path / "b")]


@pytest.mark.parametrize("log_every", [1, 20])
def test_weights_never_see_an_exchange_that_was_not_whole(
    tmp_path: Path, log_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host may run ahead of it; what is saved is the last whole step, and the run goes on from there."""
    gather = Ranks.gather
    trained(tmp_path / "whole", 2)

    def torn(self: Ranks, row: torch.Tensor, word: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows, intact = gather(self, row, word)
        return rows, intact & (word != 4)

    def work(ranks: Ranks) -> None:
        assert ranks._watch is not None
        ranks._watch.patience_s = 0.1
        one(
            tmp_path / "cut",
            ranks,
            structs.replace(CONFIG, log_every=log_every, save_every=0),
            objective=objectives[ranks.rank],
        )

    objectives = Precise(), Precise()
    with monkeypatch.context() as patched:
        patched.setattr(Ranks, "gather", torn)
        found = together(2, work)
    assert all(isinstance(error, PeerError) for error in found), found
    assert "the checkpoint of step 3 is saved" in str(found[0])
    assert len(records(tmp_path / "cut")) == 3
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000003"]
    third = Precise()
    checkpoints = Checkpoints(tmp_path / "whole" / "checkpoints", Identity(target="t", settings={}))
    assert checkpoints.restore(
        tmp_path / "whole" / "checkpoints" / "step-00000003", third.module, torch.optim.AdamW(third.module.parameters())
    ) == Position(step=3, epoch=1, index=1)
    assert all(runs.same(runs.weights(objective), runs.weights(third)) for objective in objectives)
    trained(tmp_path / "cut", 2, resume=True)
    assert [r.loss for r in records(tmp_path / "cut")] == [r.loss for r in records(tmp_path / "whole")]


def test_a_non_finite_loss_on_any_rank_ends_all_with_its_batch(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Precise:
        return one(tmp_path, ranks, objective=Precise(poison=9))  # the second batch of step 3: rank 1's

    first, second = together(2, work)
    assert isinstance(first, SpecdError)
    assert not isinstance(first, PeerError)
    assert "step 3: the loss is nan in batch 9 of epoch 0" in str(first)
    assert isinstance(second, PeerError)
    assert second.said
    assert len(records(tmp_path)) == 2


def test_a_rank_that_fails_ends_the_others_who_say_why(tmp_path: Path, alone: list[StepRecord]) -> None:
    def source(ranks: Ranks) -> runs.Source:
        def fail(batch: Batch) -> None:
            if ranks.rank == 2 and (batch.epoch, batch.index) == (1, 3):
                raise DataError("sample 3 is gone")

        return runs.Source(fail)

    first, *others = trained(tmp_path, 3, source=source)
    assert isinstance(first, PeerError)
    assert "rank 2 on" in str(first)
    assert "sample 3 is gone; the checkpoint of step 3 is saved" in str(first)
    assert all(isinstance(error, PeerError) and error.said for error in others), others
    trained(tmp_path, 2, resume=True)
    assert_alike(records(tmp_path), alone)


def test_rank_0_decides_and_one_of_each_host_goes_first() -> None:
    order: list[int] = []

    def work(ranks: Ranks) -> tuple[Any, int]:
        decided = ranks.decide("what", lambda: {"rank": ranks.rank})
        ranks.in_turn("data", lambda: order.append(ranks.rank))
        return decided, ranks.restarts

    assert together(3, work, join=False) == [({"rank": 0}, 0)] * 3
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


def test_ranks_that_disagree_are_told_where() -> None:
    def work(ranks: Ranks) -> None:
        ranks.agree({"specd": "1", "data": "9f" if ranks.rank == 1 else "41"})

    first, second = together(2, work, join=False)
    assert isinstance(first, ConfigError)
    assert "rank 1 on" in str(first)
    assert "has data 9f" in str(first)
    assert "41: give all ranks the same data" in str(first)
    assert isinstance(second, PeerError)
    assert (second.said, second.code) == (True, 2)


def test_one_rank_alone_needs_no_other() -> None:
    with Ranks() as ranks:
        ranks.agree({"data": "1"})
        ranks.join("cpu", 1)
        ranks.replicate([torch.ones(1)])
        assert ranks.decide("a", lambda: 5) == ranks.in_turn("b", lambda: 5) == 5
        assert ranks.deal([1, 2, 3]) == [1, 2, 3]
        assert (ranks.leads, ranks.num_hosts, ranks.title) == (True, 1, "")


def test_an_exchange_ends_with_the_run_and_not_with_its_time() -> None:
    """Rank 1 is there and never comes to the exchange: gloo alone would wait for all of its 30 s."""
    told = threading.Event()

    def work(ranks: Ranks) -> None:
        if ranks.rank:
            told.wait(20)
            raise DataError("it stops here")
        threading.Timer(0.1, told.set).start()
        ranks.gather(torch.zeros(3), 1)

    began = time.monotonic()
    first, second = together(2, work)
    assert time.monotonic() - began < 15
    assert isinstance(second, PeerError)
    assert isinstance(first, PeerError)
    assert "it stops here" in str(first)


def test_a_lost_store_ends_the_run() -> None:
    """The launcher is gone: whatever rank 0 was to decide will never come."""
    store = new_store()
    met = threading.Barrier(3)

    def one(rank: int) -> None:
        with Ranks(Launch(rank, 2, rank, 2), connection(store)) as ranks:
            met.wait(20)
            ranks._watch.wait(20)  # type: ignore[union-attr]
            ranks._check()

    def end() -> None:
        nonlocal store
        met.wait(20)
        del store

    found = on_threads(lambda: one(0), lambda: one(1), end)
    assert all(isinstance(error, PeerError) and "its launcher no longer answers" in str(error) for error in found[:2])
