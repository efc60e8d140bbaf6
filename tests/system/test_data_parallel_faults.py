"""Ranks that die at random moments, and torchrun itself: no step is lost or trained twice, and the numbers stay.

Each test disturbs its runs once or twice, or as often as SPECD_FAULTS says (`make test-faults`).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import ASKED, PROGRESS_S, SEED, write_data
from forks import Nursery
from ranks import DFLASH, SETTINGS, Launched
from specd.train.journal import StepRecord, read

pytestmark = pytest.mark.slow
TARGET = "synthetic:hidden=32,layers=8,vocab=256,ms=2"


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = write_data(tmp_path_factory.mktemp("data") / "tokens.jsonl")
    return ["--data", str(path), "--model", TARGET]


@pytest.fixture(scope="module")
def alone(nursery: Nursery, data: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[StepRecord]:
    """The steps of one process, undisturbed."""
    return Launched(nursery, 1, tmp_path_factory.mktemp("alone") / "run", data, {"train.epochs": 4}).finish()


def assert_alike(found: list[StepRecord], expected: list[StepRecord]) -> None:
    assert [record.batches for record in found] == [record.batches for record in expected], f"seed {SEED}"
    assert [record.loss for record in found] == pytest.approx([record.loss for record in expected], rel=1e-6)


def test_ranks_end_at_random_moments_and_go_on_with_another_number(
    nursery: Nursery, data: list[str], tmp_path: Path, alone: list[StepRecord]
) -> None:
    """Each time one is killed, stopped or told to end: all others go at once, and only rank 0 can lose steps."""
    rng, output, size = random.Random(SEED), tmp_path / "run", 2
    for _ in range(ASKED or 2):
        run = Launched(nursery, size, output, [*data, "--resume"], {"train.epochs": 4, "train.save_every": 3})
        begun = run.steps()
        fault = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
        rank = rng.randrange(size)
        run.wait_for(min(begun + rng.randrange(1, 6), len(alone) - 2))
        time.sleep(rng.uniform(0, 0.03))
        at = run.signal(rank, fault)
        codes = run.wait(rank)
        took = time.monotonic() - at
        if fault == signal.SIGSTOP:
            run.signal(rank, signal.SIGKILL)
        run.forks[rank].wait()
        which = f"seed {SEED}: {fault.name} of rank {rank} of {size}: {codes} after {took:.1f} s: {run.logs}"
        if codes == [0] * (size - 1):  # it had ended
            break
        assert took < (7 if fault == signal.SIGSTOP else 3), which
        assert set(codes) == {130 if fault == signal.SIGTERM else 1}, which
        assert len(run.said()) == 1, which
        saved = max((int(path.name[5:]) for path in (output / "checkpoints").glob("step-*")), default=0)
        lost = run.steps() - saved
        assert lost == 0 or (rank == 0 and lost <= 3), which
        size = rng.choice([2, 3])
    assert_alike(Launched(nursery, size, output, [*data, "--resume"], {"train.epochs": 4}).finish(), alone)


@pytest.mark.parametrize("number", range(ASKED or 1))
def test_a_rank_that_is_killed_before_the_first_step_ends_all(
    nursery: Nursery, data: list[str], tmp_path: Path, number: int
) -> None:
    rng = random.Random(SEED + number)
    run = Launched(nursery, 2, tmp_path / "run", data)
    limit = time.monotonic() + PROGRESS_S
    while "session" not in run.forks[0].log.read_text():
        assert time.monotonic() < limit, run.logs
        time.sleep(0.005)  # progress of another process: nothing to wait on
    time.sleep(rng.uniform(0, 0.3))
    rank = rng.randrange(2)
    at = run.signal(rank, signal.SIGKILL)
    (code,) = run.wait(rank)
    assert time.monotonic() - at < 3, f"seed {SEED}: {run.logs}"
    assert code in (0, 1)
    run.forks[rank].wait()
    if code:
        assert run.said() == [f"specd: error: rank {rank} on {os.uname().nodename}: its process is dead"] or run.steps()


def test_torchrun_starts_a_killed_run_again(data: list[str], tmp_path: Path, alone: list[StepRecord]) -> None:
    output = tmp_path / "run"
    with torchrun(tmp_path / "log", output, data, "--max-restarts", "2") as process:
        for rank in (1, 0):
            reach(output / "metrics.jsonl", 4 + 8 * (rank == 0), process)
            os.kill(rank_of(process.pid, rank), signal.SIGKILL)
        assert process.wait(PROGRESS_S) == 0, (tmp_path / "log").read_text()
    assert_alike(read(output / "metrics.jsonl"), alone)


def test_a_signal_to_torchrun_ends_the_run_with_its_step_saved(data: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    with torchrun(tmp_path / "log", output, data) as process:
        reach(output / "metrics.jsonl", 4, process)
        process.terminate()
        began = time.monotonic()
        assert process.wait(30) != 0
        assert time.monotonic() - began < 10
    said = (tmp_path / "log").read_text()
    assert said.count("specd: ") == said.count("specd: interrupted; ") == said.count("specd resume ") == 1, said
    steps = len(read(output / "metrics.jsonl"))
    assert (output / "checkpoints" / f"step-{steps:08d}").is_dir()


def torchrun(log: Path, output: Path, data: list[str], *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    command += ["-m", "specd", "train", "dflash", "--device", "cpu", "--output", str(output), *data]
    settings = SETTINGS | DFLASH | {"train.epochs": 4}
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file)


def reach(journal: Path, steps: int, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + PROGRESS_S
    while not journal.exists() or journal.read_bytes().count(b"\n") < steps:
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.01)  # progress of another process: nothing to wait on


def rank_of(launcher: int, rank: int) -> int:
    """The process of a rank among a launcher's children."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("no such rank")
