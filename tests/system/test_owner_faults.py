"""Two trainers in one directory, however they meet: one trains, every sample once, and the other is told who it is.

One try of each kind, or as many in all as SPECD_FAULTS says.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import ASKED, NUM_SAMPLES, PROGRESS_S, SEED, write_data
from forks import Fork, Nursery
from specd.train.journal import read
from tiny import TARGET, TINY

KINDS = ("fresh and fresh", "fresh and resumed", "resumed and resumed", "after a crash", "while it runs")
TAKEN = re.compile(r"specd: error: process (\d+) on \S+ trains in '.*': wait for its end")


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tokens.jsonl")


class Place:
    """A run's directory and the trainers that were started in it."""

    def __init__(self, nursery: Nursery, output: Path, data: Path) -> None:
        self.output, self._nursery, self._started = output, nursery, 0
        self._arguments = ["train", "dflash", "--model", TARGET, "--device", "cpu", "--data", str(data)]
        self._arguments += ["--output", str(output), "--set", "train.threads=1", "--set", "train.save_every=9"]
        self._arguments += [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]

    def start(self, *, resume: bool) -> Fork:
        self._started += 1
        log = self.output.with_name(f"{self.output.name}-{self._started}.log")
        return self._nursery.start(log, [*self._arguments, *(["--resume"] if resume else [])])

    def wait_for(self, steps: int) -> None:
        """Wait until so many steps are in its journal; for none, until somebody owns it."""
        journal, limit = self.output / "metrics.jsonl", time.monotonic() + PROGRESS_S
        while not self.output.exists() or (
            steps and (not journal.exists() or journal.read_bytes().count(b"\n") < steps)
        ):
            assert time.monotonic() < limit, f"seed {SEED}: no step {steps} in {self.output}"
            time.sleep(0.002)  # progress of another process: nothing to wait on

    def assert_exact(self) -> None:
        """Every sample was trained once, in steps that follow each other, and the draft is there."""
        trained = [
            (batch.epoch, sample)
            for record in read(self.output / "metrics.jsonl")
            for batch in record.batches
            for sample in batch.samples
        ]
        assert sorted(trained) == [(0, sample) for sample in range(NUM_SAMPLES)], f"seed {SEED}"
        assert (self.output / "draft" / "model.safetensors").is_file()
        assert not (self.output / ".lock").exists()


@pytest.mark.parametrize("number", range(ASKED or len(KINDS)))
def test_one_of_two_trainers_trains(nursery: Nursery, data: Path, tmp_path: Path, number: int) -> None:
    kind, rng = KINDS[number % len(KINDS)], random.Random(SEED + number)
    place = Place(nursery, tmp_path / "run", data)
    if kind in ("resumed and resumed", "after a crash"):
        killed = place.start(resume=False)
        place.wait_for(rng.randrange(1, 50) if kind == "resumed and resumed" else rng.randrange(3))
        time.sleep(rng.uniform(0, 0.02))
        killed.kill()
        assert killed.wait() == -9
        assert (place.output / ".lock").exists()
    first = place.start(resume=kind in ("resumed and resumed", "after a crash"))
    if kind == "while it runs":
        place.wait_for(rng.randrange(50))
    time.sleep(rng.uniform(0, 0.05))
    pair = [first, place.start(resume=kind != "fresh and fresh")]
    codes = [trainer.wait() for trainer in pair]
    said = [trainer.log.read_text() for trainer in pair]
    if kind == "while it runs" and codes == [0, 0]:  # the second came as the first had ended
        assert "is finished" in said[1], f"seed {SEED}: {said}"
    else:
        assert sorted(codes) == [0, 2], f"seed {SEED}, {kind}: {said}"
        taken = TAKEN.search(said[codes.index(2)])
        assert taken is not None, f"seed {SEED}, {kind}: {said}"
        assert int(taken[1]) == pair[codes.index(0)].pid
    place.assert_exact()
    again = place.start(resume=True)
    assert again.wait() == 0
    assert "is finished" in again.log.read_text()
