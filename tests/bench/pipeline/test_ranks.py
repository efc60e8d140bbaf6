"""Trainers in processes: rows are the first one's with the memory of all, and ranks train what they were dealt."""

from __future__ import annotations

import threading
from pathlib import Path

import msgspec
import pytest
import torch

from specd.bench.made_up import MadeUp
from specd.bench.pipeline import apart, ranks
from specd.bench.pipeline.defaults import defaults
from specd.bench.pipeline.ranks import RanksAnswer, RanksJob, RanksTimes, collect, met
from specd.bench.pipeline.settings import batches
from specd.bench.pipeline.step import Clocked, OptimizerStep, given, make_step
from specd.config.settings import TargetConfig, TrainConfig
from specd.errors import DaemonError
from specd.targets.registry import load_target

TINY = "synthetic:hidden=32,layers=8,vocab=64"
SETTINGS = defaults(True, 1, TINY, {}, trainers=2)


def answer(seconds: float, memory: int) -> RanksAnswer:
    clocked = Clocked(seconds=(seconds,), samples=1, tokens=64)
    return RanksAnswer(timed=(RanksTimes(lengths="fixed", depth=0, clocked=clocked),), memory_bytes=memory)


def test_rows_are_the_first_ones_with_the_memory_of_all() -> None:
    (row,), (clocked,) = collect([(1, answer(0.9, 7)), (0, answer(0.5, 5))], SETTINGS, 2, fed=False)
    assert (row.mode, row.parallel, row.devices, row.transport) == ("co-located data-parallel", 2, 2, "inproc")
    assert (row.iteration_ms, row.trainer_memory_bytes, clocked.seconds) == (500.0, 12, (0.5,))
    (row,), _ = collect([(0, answer(0.5, 5)), (1, RanksAnswer())], SETTINGS, 1, fed=False)
    assert (row.mode, row.devices) == ("co-located", 1)
    (row,), _ = collect([(0, answer(0.5, 5))], SETTINGS, 2, fed=True)
    assert (row.mode, row.parallel, row.devices, row.transport) == ("disaggregated", 2, 3, "shm")


def test_one_that_failed_fails_all() -> None:
    with pytest.raises(DaemonError, match="no memory"):
        collect([(0, answer(0.5, 5)), (1, RanksAnswer(error="no memory"))], SETTINGS, 2, fed=False)


def test_ranks_train_one_step_together(tmp_path: Path) -> None:
    """They begin with the weights of rank 0, and each step leaves the same ones on all."""
    target = load_target(TargetConfig(model=TINY))
    settings = msgspec.structs.replace(SETTINGS, draft="dflash")
    states = MadeUp(torch.randn(256, 3, 32))
    found: dict[int, list[torch.Tensor]] = {}

    def one(rank: int) -> None:
        seeded = msgspec.structs.replace(settings, seed=rank)
        step = make_step(seeded, target.contract, lambda name: bytes(target.artifact(name)), "cpu")
        assert isinstance(step, OptimizerStep)
        job = RanksJob(settings=settings, device="cpu", depths=(0,), sizes=(2,), rank=rank, world=2,
                       store=str(tmp_path / "store"))  # fmt: skip
        with met(job, "2", 2) as both:
            both.join("cpu", 60.0)
            step.join(both)
            (delivery,) = given(batches(settings, "fixed", 64, 1, rank), states)
            step(delivery, wait=True)
        found[rank] = [parameter.detach().clone() for parameter in step.parameters]

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(map(torch.equal, found[0], found[1]))
    begun = make_step(
        msgspec.structs.replace(settings, seed=0), target.contract, lambda name: bytes(target.artifact(name)), "cpu"
    )
    rate = TrainConfig().lr  # AdamW's first step moves a weight by no more than about its rate
    assert all(0 < (new - old).abs().max() < 2 * rate for new, old in zip(found[1], begun.parameters, strict=True))


def test_daemons_feed_one_trainer_and_then_two(tmp_path: Path) -> None:
    asked = {"draft": "synthetic:ms=5,params=64", "steps": 3, "depths": (1,), "merge_depth": 2}
    settings = defaults(True, 1, f"{TINY},ms=2", asked, trainers=2)
    with (
        apart.daemons(settings, tmp_path) as endpoints,
        ranks.processes(settings, settings.trainer_devices, (1, 2), (1,), tmp_path, endpoints) as children,
    ):
        for size in (1, 2):
            (row,), (clocked,) = ranks.timed(children, settings, size, fed=True)
            assert (row.mode, row.parallel, row.devices) == ("disaggregated", size, 1 + size)
            assert row.samples_per_s == pytest.approx(size * 4 / row.iteration_ms * 1e3, rel=1e-3)
            assert clocked.stats.batches == 3, "of its own, whoever else trains"


@pytest.mark.gpu(2)
def test_two_gpus_train_together_after_one_did_alone(tmp_path: Path) -> None:
    """Over nccl, twice in one process: gradients of the first group are nothing to the second one's."""
    asked = {"target": {"num_layers": 8}, "steps": 3, "depths": (0, 2), "lengths": ("fixed",), "batch_tokens": 1024,
             "sample_tokens": 512, "draft_config": {"num_taps": 3}}  # fmt: skip
    settings = defaults(False, 1, "Qwen3-4B", asked)
    places = ["cuda:0", "cuda:1"]
    with ranks.processes(settings, places, (1, 2, 2), settings.depths, tmp_path) as children:
        for size in (1, 2, 2):
            rows, _ = ranks.timed(children, settings, size, fed=False)
            assert [(row.parallel, row.depth) for row in rows] == [(size, 0), (size, 2)]
            assert all(row.samples_per_s > 0 for row in rows)
