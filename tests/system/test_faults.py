"""Faults with real processes: whatever is killed or stopped, every sample is trained once and the losses stay the same.

Each test disturbs one run twice, or as often as SPECD_FAULTS says.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from faults import ASKED, DEPTH, LEASE_S, SEED, Daemon, Trainer, daemons, disturb, settled, write_data

REPETITIONS = ASKED or 2
EPOCHS = max(1, REPETITIONS // 4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tokens.jsonl")


@pytest.fixture
def start() -> Iterator[Callable[[str], Daemon]]:
    """Starts a daemon by name; all of them end with the test."""
    with daemons() as starter:
        yield starter


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float | None]:
    """The losses of a run without faults."""
    with daemons() as starter:
        return train(tmp_path_factory.mktemp("reference"), data, starter("r")).finish()


def train(directory: Path, data: Path, *served: Daemon) -> Trainer:
    return Trainer(directory / "run", data, [daemon.endpoint for daemon in served], epochs=EPOCHS)


def finish(trainer: Trainer, done: int, expected: list[float | None]) -> None:
    losses = trainer.finish()
    assert done == REPETITIONS, f"seed {SEED}: the run ended after {done} faults"
    assert losses == expected, f"seed {SEED}"


def test_worker_killed(
    data: Path, tmp_path: Path, start: Callable[[str], Daemon], reference: list[float | None]
) -> None:
    daemon = start("a")
    trainer = train(tmp_path, data, daemon)

    def fault(rng: random.Random) -> None:
        pid = daemon.status().worker_pid
        if pid:
            os.kill(pid, signal.SIGKILL)

    finish(trainer, disturb([trainer], REPETITIONS, fault), reference)
    assert daemon.status().counters["worker_restarts"] >= min(REPETITIONS, 1)
    settled(daemon)


def test_a_worker_that_hangs_is_replaced(data: Path, tmp_path: Path, reference: list[float | None]) -> None:
    """SIGSTOP looks like a device or driver that never answers: control hears nothing, and nobody died."""
    with daemons(hang_s=1.0) as start:
        daemon = start("a")
        trainer = train(tmp_path, data, daemon)

        def fault(rng: random.Random) -> None:
            pid = daemon.status().worker_pid
            if pid:
                os.kill(pid, signal.SIGSTOP)

        finish(trainer, disturb([trainer], REPETITIONS, fault), reference)
        assert daemon.status().counters["worker_restarts"] >= min(REPETITIONS, 1)
        settled(daemon)


def test_control_killed_and_restarted(
    data: Path, tmp_path: Path, start: Callable[[str], Daemon], reference: list[float | None]
) -> None:
    daemon = start("a")
    trainer = train(tmp_path, data, daemon)

    def fault(rng: random.Random) -> None:
        daemon.process.kill()
        daemon.restart()

    finish(trainer, disturb([trainer], REPETITIONS, fault), reference)
    settled(daemon)


def test_trainer_killed_and_resumed(
    data: Path, tmp_path: Path, start: Callable[[str], Daemon], reference: list[float | None]
) -> None:
    daemon = start("a")
    rng = random.Random(SEED)
    trainer = train(tmp_path, data, daemon)
    for _ in range(REPETITIONS):
        trainer.wait_for(min(trainer.steps() + rng.randint(1, 4), len(reference)))
        time.sleep(rng.uniform(0, 0.05))
        trainer.kill_and_resume()
    finish(trainer, REPETITIONS, reference)
    settled(daemon)


def test_one_of_two_daemons_killed(
    data: Path, tmp_path: Path, start: Callable[[str], Daemon], reference: list[float | None]
) -> None:
    pair = [start("a"), start("b")]
    trainer = train(tmp_path, data, *pair)

    def fault(rng: random.Random) -> None:
        daemon = rng.choice(pair)
        daemon.process.kill()
        daemon.restart()

    finish(trainer, disturb([trainer], REPETITIONS, fault), reference)
    for daemon in pair:
        settled(daemon)


@pytest.mark.parametrize("transport", ["auto", pytest.param("bytes", marks=pytest.mark.slow)])
def test_one_of_two_workers_stopped(
    data: Path, tmp_path: Path, start: Callable[[str], Daemon], reference: list[float | None], transport: str
) -> None:
    """The other brings what it owes, and training goes on within 5 s; over `bytes` a transfer may be under way."""
    pair = [start("a"), start("b")]
    endpoints = [daemon.endpoint for daemon in pair]
    trainer = Trainer(tmp_path / "run", data, endpoints, epochs=EPOCHS, transport=transport)

    def fault(rng: random.Random) -> None:
        pid = rng.choice(pair).status().worker_pid
        os.kill(pid, signal.SIGSTOP)
        goal, began = trainer.steps() + 2 * DEPTH, time.monotonic()
        while trainer.running and trainer.steps() < goal:
            assert time.monotonic() < began + 5, f"seed {SEED}: no batches for 5 s"
            time.sleep(0.01)
        print(f"{2 * DEPTH} batches {time.monotonic() - began:.1f} s after one of two workers was stopped")
        os.kill(pid, signal.SIGCONT)

    try:
        finish(trainer, disturb([trainer], REPETITIONS, fault), reference)
    finally:
        for daemon in pair:
            os.kill(daemon.status().worker_pid, signal.SIGCONT)
    for daemon in pair:
        settled(daemon)


def test_trainer_stopped_past_its_lease(
    data: Path, tmp_path: Path, start: Callable[[str], Daemon], reference: list[float | None]
) -> None:
    daemon = start("a")
    trainer = train(tmp_path, data, daemon)

    def fault(rng: random.Random) -> None:
        trainer.process.send_signal(signal.SIGSTOP)
        time.sleep(LEASE_S * rng.uniform(1.2, 1.6))
        assert not daemon.status().sessions, "the lease of a stopped trainer must expire"
        trainer.process.send_signal(signal.SIGCONT)

    finish(trainer, disturb([trainer], REPETITIONS, fault), reference)
    assert daemon.status().counters["expired"] >= 1
    settled(daemon)
