"""Faults with real processes: whatever is killed or stopped, every sample is trained once and the losses stay the same.

Each test disturbs one run SPECD_FAULTS times (2 by default, 20 under `make test-faults`) at random moments, and
compares its journal with that of a run nobody disturbed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from specd.protocol import StatusReport
from specd.session import ask_status
from specd.train.journal import read

REPETITIONS = int(os.environ.get("SPECD_FAULTS", "2"))
SEED = int(os.environ.get("SPECD_FAULTS_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
NUM_SAMPLES = 240
EPOCHS = max(1, REPETITIONS // 4)
LEASE_S = 1.0
TARGET = "synthetic:hidden=32,layers=8,vocab=256,ms=15"
TTL = ["--set", f"ring.lease_ttl_s={LEASE_S}"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pre-tokenised samples of 8 to 40 tokens."""
    rng = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("data") / "tokens.jsonl"
    with path.open("w") as file:
        for _ in range(NUM_SAMPLES):
            ids = rng.integers(0, 255, rng.integers(8, 40)).tolist()
            file.write(json.dumps({"input_ids": ids, "loss_mask": [1] * len(ids)}) + "\n")
    return path


class Daemon:
    """One `specd start` in a process of its own; `restart` after a kill keeps the endpoint."""

    def __init__(self, directory: Path, name: str) -> None:
        self.endpoint = f"ipc://{directory}/{name}.sock"
        self.log = (directory / f"{name}.log").open("ab")
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "specd", "start", "--model", TARGET, "--endpoint", self.endpoint, "--exact"]
        command += ["--slots", "8", "--slot-tokens", "128", *TTL]
        return subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def status(self) -> StatusReport:
        return ask_status(self.endpoint, 30)

    def restart(self) -> None:
        self.process.wait()
        self.process = self._start()

    def close(self) -> None:
        self.process.terminate()
        assert self.process.wait(30) == 0
        self.log.close()


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for sockets: short, because an ipc path has at most 107 bytes, and private."""
    path = Path(f"/tmp/sf-{os.getpid()}-{random.randrange(1 << 24):x}")
    path.mkdir(mode=0o700)
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@pytest.fixture
def daemons(place: Path) -> Iterator[Callable[[str], Daemon]]:
    started: list[Daemon] = []

    def start(name: str) -> Daemon:
        started.append(Daemon(place, name))
        return started[-1]

    yield start
    for daemon in started:
        daemon.close()


def train(output: Path, data: Path, *endpoints: str, resume: bool = False) -> subprocess.Popen[bytes]:
    """`specd train dflash` with a tiny draft."""
    command = [sys.executable, "-m", "specd", "train", "dflash", "--device", "cpu"]
    command += ["--data", str(data), "--output", str(output)]
    for endpoint in endpoints:
        command += ["--endpoint", endpoint]
    settings = {
        "draft.num_layers": 1, "draft.num_taps": 2, "draft.block_size": 4, "draft.num_anchors": 4,
        "draft.mask_token_id": 255, "data.batch_tokens": 80, "data.max_length": 40, "train.epochs": EPOCHS,
        "train.save_every": 5, "train.dtype": "float32", "train.threads": 1, "subscriber.depth": 3,
        "subscriber.max_attempts": 100,
    }  # fmt: skip
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen([*command, *(["--resume"] if resume else [])], stdout=log, stderr=log)


def losses(output: Path) -> list[float | None]:
    return [record.loss for record in read(output / "metrics.jsonl")]


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float | None]:
    """The losses of a run nobody disturbs."""
    directory = Path(f"/tmp/sf-{os.getpid()}-r")
    directory.mkdir(mode=0o700)
    output = tmp_path_factory.mktemp("reference") / "run"
    daemon = Daemon(directory, "r")
    try:
        assert train(output, data, daemon.endpoint).wait(240) == 0, output.with_suffix(".log").read_text()
    finally:
        daemon.close()
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()
    check(output, losses(output))
    return losses(output)


def check(output: Path, expected: list[float | None]) -> None:
    """Every sample once an epoch, and the very losses expected."""
    records = read(output / "metrics.jsonl")
    trained = [(batch.epoch, sample) for record in records for batch in record.batches for sample in batch.samples]
    assert sorted(trained) == [(epoch, sample) for epoch in range(EPOCHS) for sample in range(NUM_SAMPLES)]
    assert [record.loss for record in records] == expected
    assert len(records) > 20


def disturb(trainer: subprocess.Popen[bytes], output: Path, fault: Callable[[random.Random], None]) -> int:
    """Do `fault` at random moments while the trainer makes progress; how often it was done."""
    rng = random.Random(SEED)
    done = 0
    while done < REPETITIONS and trainer.poll() is None:
        seen = steps(output)
        while trainer.poll() is None and steps(output) < seen + rng.randint(1, 3):
            time.sleep(0.01)  # progress of another process: nothing to wait on
        if trainer.poll() is None:
            time.sleep(rng.uniform(0, 0.05))
            fault(rng)
            done += 1
    return done


def steps(output: Path) -> int:
    try:
        return (output / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def finish(trainer: subprocess.Popen[bytes], output: Path, done: int, expected: list[float | None]) -> None:
    code = trainer.wait(240)
    log = output.with_suffix(".log").read_text()
    assert code == 0, f"seed {SEED}: {log}"
    assert done == REPETITIONS, f"seed {SEED}: the run ended after {done} faults"
    check(output, expected)


def settled(daemon: Daemon, num_slots: int = 8) -> None:
    """No slot, session or request is left once the trainer is gone."""
    limit = time.monotonic() + 10
    while (status := daemon.status()).sessions or status.slots["free"] != num_slots or status.queued:
        assert time.monotonic() < limit, status
        time.sleep(0.05)


def test_worker_killed(
    data: Path, tmp_path: Path, daemons: Callable[[str], Daemon], reference: list[float | None]
) -> None:
    daemon, output = daemons("a"), tmp_path / "run"
    trainer = train(output, data, daemon.endpoint)

    def fault(rng: random.Random) -> None:
        pid = daemon.status().worker_pid
        if pid:
            os.kill(pid, signal.SIGKILL)

    finish(trainer, output, disturb(trainer, output, fault), reference)
    assert daemon.status().counters["worker_restarts"] >= min(REPETITIONS, 1)
    settled(daemon)


def test_control_killed_and_restarted(
    data: Path, tmp_path: Path, daemons: Callable[[str], Daemon], reference: list[float | None]
) -> None:
    daemon, output = daemons("a"), tmp_path / "run"
    trainer = train(output, data, daemon.endpoint)

    def fault(rng: random.Random) -> None:
        daemon.process.kill()
        daemon.restart()

    finish(trainer, output, disturb(trainer, output, fault), reference)
    settled(daemon)


def test_trainer_killed_and_resumed(
    data: Path, tmp_path: Path, daemons: Callable[[str], Daemon], reference: list[float | None]
) -> None:
    daemon, output = daemons("a"), tmp_path / "run"
    rng = random.Random(SEED)
    trainer = train(output, data, daemon.endpoint)
    for _ in range(REPETITIONS):
        seen = steps(output)
        while trainer.poll() is None and steps(output) < min(seen + rng.randint(1, 4), len(reference)):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        trainer.kill()
        trainer.wait()
        trainer = train(output, data, daemon.endpoint, resume=True)
    finish(trainer, output, REPETITIONS, reference)
    settled(daemon)


def test_one_of_two_daemons_killed(
    data: Path, tmp_path: Path, daemons: Callable[[str], Daemon], reference: list[float | None]
) -> None:
    pair, output = [daemons("a"), daemons("b")], tmp_path / "run"
    trainer = train(output, data, *(daemon.endpoint for daemon in pair))

    def fault(rng: random.Random) -> None:
        daemon = rng.choice(pair)
        daemon.process.kill()
        daemon.restart()

    finish(trainer, output, disturb(trainer, output, fault), reference)
    for daemon in pair:
        settled(daemon)


def test_trainer_stopped_past_its_lease(
    data: Path, tmp_path: Path, daemons: Callable[[str], Daemon], reference: list[float | None]
) -> None:
    daemon, output = daemons("a"), tmp_path / "run"
    trainer = train(output, data, daemon.endpoint)

    def fault(rng: random.Random) -> None:
        trainer.send_signal(signal.SIGSTOP)
        time.sleep(LEASE_S * rng.uniform(1.2, 1.6))
        assert not daemon.status().sessions, "the lease of a stopped trainer must expire"
        trainer.send_signal(signal.SIGCONT)

    finish(trainer, output, disturb(trainer, output, fault), reference)
    assert daemon.status().counters["expired"] >= 1
    settled(daemon)
