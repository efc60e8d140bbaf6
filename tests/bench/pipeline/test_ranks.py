"""Co-location: gradients are the mean of all processes, and rows are the first one's with the memory of all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from specd.bench.pipeline.colocated import ColocatedAnswer, ColocatedTimes, Reduction

from specd.bench.pipeline import colocated
from specd.bench.pipeline.process_group import joined
from specd.bench.pipeline.step import Clocked
from specd.errors import DaemonError


def test_data_parallel_gradients_are_the_mean_of_all(tmp_path: Path) -> None:
    found: dict[int, list[torch.Tensor]] = {}

    def one(rank: int) -> None:
        layer = torch.nn.Linear(3, 2)
        with torch.no_grad():
            layer.weight.fill_(0.5)
        with joined("gloo", str(tmp_path / "store"), rank, 2) as group:
            reduction = Reduction(group, 2)
            reduction.attach(list(layer.parameters()))
            reduction.meet("cpu")
            reduction.on = True
            layer(torch.full((1, 3), float(1 + 2 * rank))).sum().backward()
            reduction()
            reduction.meet("cpu")
            found[rank] = [p.grad.clone() for p in layer.parameters() if p.grad is not None]

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for rank in (0, 1):
        assert torch.equal(found[rank][0], torch.full((2, 3), 2.0))
        assert torch.equal(found[rank][1], torch.ones(2))


def answer(seconds: float, memory: int, parallel: int = 2) -> ColocatedAnswer:
    clocked = Clocked(seconds=(seconds,), samples=1, tokens=64)
    times = ColocatedTimes(lengths="fixed", depth=0, parallel=parallel, clocked=clocked)
    return ColocatedAnswer(timed=(times,), memory_bytes=memory)


def test_rows_are_the_first_ones_with_the_memory_of_all() -> None:
    (row,) = colocated._rows([(1, answer(0.9, 7)), (0, answer(0.5, 5))])
    assert (row.mode, row.parallel, row.devices) == ("co-located data-parallel", 2, 2)
    assert (row.iteration_ms, row.trainer_memory_bytes) == (500.0, 12)
    (row,) = colocated._rows([(0, answer(0.5, 5, parallel=1))])
    assert (row.mode, row.devices) == ("co-located", 1)


def test_one_that_failed_fails_all() -> None:
    with pytest.raises(DaemonError, match="no memory"):
        colocated._rows([(0, answer(0.5, 5)), (1, ColocatedAnswer(error="no memory"))])
