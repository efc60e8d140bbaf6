"""Data-parallel training through the command line: any number of ranks trains what one trains, and all end together.

Ranks are forks that find what torchrun would have told them; one test has torchrun itself.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import daemons, write_data
from forks import Nursery
from ranks import Launched
from specd.train.journal import StepRecord
from specd.train.measurement import Measurement
from specd.train.measurement import read as measurements

TARGET = "synthetic:hidden=32,layers=8,vocab=256,ms=2"


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a run trains on, with a target in each rank's process; some of it is held out."""
    path = write_data(tmp_path_factory.mktemp("data") / "tokens.jsonl")
    held_out = ["--set", "validation.share=0.1", "--set", "validation.every=4"]
    return ["--data", str(path), "--model", TARGET, *held_out]


@pytest.fixture(scope="module")
def runs_alone(nursery: Nursery, data: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Launched]:
    """Runs of one process, by draft."""
    place = tmp_path_factory.mktemp("alone")
    return {name: Launched(nursery, 1, place / name, data, method=name) for name in ("dflash", "eagle3")}


@pytest.fixture(scope="module")
def alone(runs_alone: dict[str, Launched]) -> dict[str, list[StepRecord]]:
    """Their steps."""
    return {name: run.finish() for name, run in runs_alone.items()}


@pytest.fixture(scope="module")
def held_out(runs_alone: dict[str, Launched], alone: dict[str, list[StepRecord]]) -> dict[str, list[Measurement]]:
    """Their measurements, once all have ended."""
    assert alone
    return {name: measurements(run.output / "validation.jsonl") for name, run in runs_alone.items()}


def assert_alike(found: list[StepRecord], expected: list[StepRecord]) -> None:
    assert [record.batches for record in found] == [record.batches for record in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.weight, mine.tokens, mine.lr) == (theirs.weight, theirs.tokens, theirs.lr)
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
    losses = [record.loss for record in expected if record.loss is not None]
    assert len(set(losses)) > 20


@pytest.mark.parametrize(("method", "size"), [("dflash", 2), ("eagle3", 3)])
def test_ranks_train_what_one_trains(
    nursery: Nursery,
    data: list[str],
    tmp_path: Path,
    alone: dict[str, list[StepRecord]],
    held_out: dict[str, list[Measurement]],
    method: str,
    size: int,
) -> None:
    pair = [Launched(nursery, size, tmp_path / name, data, method=method) for name in "ab"[: 1 + (size == 2)]]
    for run in pair:
        assert_alike(run.finish(), alone[method])
        found = measurements(run.output / "validation.jsonl")
        assert [one.step for one in found][:2] == [4, 8]
        for mine, theirs in zip(found, held_out[method], strict=True):
            assert mine.loss == pytest.approx(theirs.loss, rel=1e-6)
            assert (mine.step, mine.best, mine.weight) == (theirs.step, theirs.best, theirs.weight)
        first, *others = (fork.log.read_text() for fork in run.forks)
        assert f"· {size} ranks on 1 host" in first
        assert f"steps trained by {size} ranks; draft in" in first
        assert not any(others), "rank 0 alone speaks"
    drafts = [(run.output / "draft" / "model.safetensors").read_bytes() for run in pair]
    assert len(set(drafts)) == 1


@pytest.mark.parametrize(("fault", "rank"), [(signal.SIGKILL, 0), (signal.SIGSTOP, 1), (signal.SIGTERM, 1)])
def test_the_end_of_one_is_the_end_of_all(
    nursery: Nursery, data: list[str], tmp_path: Path, fault: signal.Signals, rank: int
) -> None:
    run = Launched(nursery, 3, tmp_path / "run", data, {"train.epochs": 9, "train.save_every": 1})
    run.wait_for(4)
    at = run.signal(rank, fault)
    codes = run.wait(rank)
    took = time.monotonic() - at
    if fault == signal.SIGSTOP:
        run.signal(rank, signal.SIGKILL)
    run.forks[rank].wait()
    assert took < (7 if fault == signal.SIGSTOP else 3), run.logs
    assert codes == [130 if fault == signal.SIGTERM else 1] * 2, run.logs
    reason = {
        signal.SIGKILL: "its process is dead", signal.SIGSTOP: "no sign of life for 5 s",
        signal.SIGTERM: "it was interrupted",
    }[fault]  # fmt: skip
    (said,) = run.said()
    if rank == 0 and fault == signal.SIGTERM:
        assert said == f"specd: interrupted; {run.steps()} steps are kept"
    else:
        assert said.startswith(f"specd: error: rank {rank} on "), said
        assert reason in said
    steps = run.steps()
    saved = max(int(path.name[5:]) for path in (run.output / "checkpoints").glob("step-*"))
    if rank or fault == signal.SIGTERM:
        assert saved == steps, "the very step"
        assert f"the checkpoint of step {steps} is saved" in said or rank == 0
    else:
        assert saved >= steps - 1, "rank 0 itself could save no more"


def test_a_run_goes_on_with_another_number_of_ranks(
    nursery: Nursery, data: list[str], tmp_path: Path, alone: dict[str, list[StepRecord]]
) -> None:
    """2 until one is killed, 3 until one is told to stop, then 1; and 2 that their launcher starts again."""
    first = Launched(nursery, 2, tmp_path / "run", data)
    first.wait_for(7)
    first.signal(0, signal.SIGKILL)
    first.wait()
    begun = first.steps()
    second = Launched(nursery, 3, tmp_path / "run", [*data, "--resume"])
    second.wait_for(begun + 5)
    second.signal(2, signal.SIGTERM)
    assert second.wait() == [130] * 3, second.logs
    assert_alike(Launched(nursery, 1, tmp_path / "run", [*data, "--resume"]).finish(), alone["dflash"])
    again = Launched(nursery, 2, tmp_path / "again", data)
    again.wait_for(6)
    again.signal(1, signal.SIGKILL)
    again.wait()
    assert_alike(Launched(nursery, 2, tmp_path / "again", data, restarts=1).finish(), alone["dflash"])
    refused = Launched(nursery, 2, tmp_path / "again", data, restarts=1, launcher="another")
    assert refused.wait() == [2, 2]
    assert "exists and is not empty" in refused.said()[0]


@pytest.mark.parametrize(
    ("settings", "own", "said"),
    [
        ({"train.accumulation": 2}, {}, "train.accumulation=2 batches a step cannot be shared by 3 ranks"),
        ({}, {1: {"data.max_length": 30}}, "rank 1 on .* has data.max_length 30, rank 0 on .* 40: give all"),
        ({}, {2: {"train.lr": -1}}, "rank 2 on .*: settings: Expected `float` > 0.0, got -1"),
        ({"draft.block_size": -3}, {}, "specd: error: settings: Expected `int` >= 2, got -3"),
    ],
)
def test_a_wrong_start_is_said_once_and_leaves_nothing(
    nursery: Nursery, data: list[str], tmp_path: Path, settings: dict[str, object],
    own: dict[int, dict[str, object]], said: str,
) -> None:  # fmt: skip
    arguments = {
        rank: [part for key, value in more.items() for part in ("--set", f"{key}={value}")]
        for rank, more in own.items()
    }
    run = Launched(nursery, 3, tmp_path / "run", data, settings, own=arguments)
    assert run.wait() == [2, 2, 2], run.logs
    (found,) = run.said()
    assert re.search(said, found), found
    assert not run.output.exists()


def test_daemons_that_serve_ranks(
    nursery: Nursery, data: list[str], tmp_path: Path, alone: dict[str, list[StepRecord]]
) -> None:
    """One of two dies; then the other does, with nothing left to train on. More ranks than it takes are refused."""
    with daemons() as start:
        one, two = start("a"), start("b")
        for daemon in (one, two):
            daemon.status()
        ends = ["--endpoint", one.endpoint, "--endpoint", two.endpoint]
        run = Launched(nursery, 2, tmp_path / "run", [*data[:2], *data[4:], *ends])
        run.wait_for(3)
        two.process.kill()
        assert_alike(run.finish(), alone["dflash"])
        taken = [*data[:2], *data[4:], "--endpoint", one.endpoint]
        many = Launched(nursery, 5, tmp_path / "many", taken, {"train.accumulation": 5})
        assert many.wait() == [2] * 5, many.logs
        (said,) = many.said()
        assert "takes 4 sessions (ring.max_sessions), and this run has 5 ranks" in said
        last = Launched(nursery, 2, tmp_path / "last", taken, {"train.epochs": 9, "subscriber.connect_s": 1})
        last.wait_for(3)
        one.process.kill()
        assert last.wait() == [1, 1], last.logs
        (said,) = last.said()
        assert "no daemon for" in said
        assert one.endpoint in said
        assert f"step-{last.steps():08d}" in {path.name for path in (last.output / "checkpoints").iterdir()}
        for daemon in (one, two):  # what is closed ends well
            daemon.restart()
            daemon.status()
