"""Real daemons and trainers to kill and stop, and the proof that nothing came of it: tests share them.

A test disturbs a run SPECD_FAULTS times at random moments (`make test-faults` asks for 20), and compares its journal
with that of a run nobody disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from specd.client.ask import ask_status
from specd.protocol.messages import StatusReport
from specd.train.journal import read

ASKED = int(os.environ.get("SPECD_FAULTS", "0"))
"""Faults a test, 0 for its own choice."""
SEED = int(os.environ.get("SPECD_FAULTS_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
NUM_SAMPLES = 240
LEASE_S = 1.0
PROGRESS_S = 120.0
"""A trainer that runs takes its next steps within this, whatever was done to its daemon."""
NUM_SLOTS = 8
DEPTH = 3
TARGET = "synthetic:hidden=32,layers=8,vocab=256,ms=15"


def write_data(path: Path) -> Path:
    """Pre-tokenised samples of 8 to 40 tokens."""
    rng = np.random.default_rng(5)
    with path.open("w") as file:
        for _ in range(NUM_SAMPLES):
            ids = rng.integers(0, 255, rng.integers(8, 40)).tolist()
            file.write(json.dumps({"input_ids": ids, "loss_mask": [1] * len(ids)}) + "\n")
    return path


@contextlib.contextmanager
def private_directory() -> Iterator[Path]:
    """A directory for sockets: short, because an ipc path has at most 107 bytes, and private."""
    path = Path(f"/tmp/sf-{os.getpid()}-{random.randrange(1 << 24):x}")
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


class Daemon:
    """One `specd start` in a process of its own; `restart` after a kill keeps the endpoint. device: of its target."""

    def __init__(
        self,
        directory: Path,
        name: str,
        device: str = "cpu",
        lease_s: float = LEASE_S,
        hang_s: float = 60.0,
        target: str = TARGET,
    ) -> None:
        self.endpoint = f"ipc://{directory}/{name}.sock"
        self.log = (directory / f"{name}.log").open("ab")
        self._device = device
        self._target = target
        self._settings = {"ring.lease_ttl_s": lease_s, "hang_s": hang_s}
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "specd", "start", "--model", self._target, "--exact"]
        command += [
            "--endpoint",
            self.endpoint,
            "--device",
            self._device,
            "--slots",
            str(NUM_SLOTS),
            "--slot-tokens",
            "128",
        ]
        for key, value in self._settings.items():
            command += ["--set", f"{key}={value}"]
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


@contextlib.contextmanager
def daemons(device: str = "cpu", lease_s: float = LEASE_S, hang_s: float = 60.0) -> Iterator[Callable[[str], Daemon]]:
    """A function that starts one by name, with its socket in a directory of its own."""
    with private_directory() as place, contextlib.ExitStack() as running:

        def start(name: str) -> Daemon:
            daemon = Daemon(place, name, device, lease_s, hang_s)
            running.callback(daemon.close)
            return daemon

        yield start


class Trainer:
    """One `specd train dflash` with a tiny draft; `start` after its end resumes it.

    endpoints: none hosts the target in the trainer's own process. borrow: it reads the daemon's slots in place.
    """

    def __init__(
        self,
        output: Path,
        data: Path,
        endpoints: Sequence[str],
        *,
        epochs: int,
        device: str = "cpu",
        transport: str = "auto",
        borrow: bool = False,
    ) -> None:
        self.output = output
        self.command = [sys.executable, "-m", "specd", "train", "dflash", "--device", device]
        self.command += ["--data", str(data), "--output", str(output)]
        for endpoint in endpoints:
            self.command += ["--endpoint", endpoint, "--transport", transport]
        if not endpoints:
            self.command += ["--model", TARGET]
        settings = {
            "draft.num_layers": 1, "draft.num_taps": 2, "draft.block_size": 4, "draft.num_anchors": 4,
            "draft.mask_token_id": 255, "draft.attention": "sdpa", "data.batch_tokens": 80, "data.max_length": 40,
            "train.epochs": epochs, "train.save_every": 5, "train.dtype": "float32", "train.threads": 1,
            "subscriber.depth": DEPTH, "subscriber.borrow": str(borrow).lower(),
        }  # fmt: skip
        for key, value in settings.items():
            self.command += ["--set", f"{key}={value}"]
        self.epochs = epochs
        self.start()

    def start(self, *, resume: bool = False) -> None:
        with self.output.with_suffix(".log").open("ab") as log:
            command = [*self.command, *(["--resume"] if resume else [])]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def kill_and_resume(self) -> None:
        self.process.kill()
        self.process.wait()
        self.start(resume=True)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def steps(self) -> int:
        """Optimizer steps in its journal so far."""
        try:
            return (self.output / "metrics.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def wait_for(self, steps: int) -> None:
        """Wait until it has done so many steps, or has ended. Fails when it hangs."""
        limit = time.monotonic() + PROGRESS_S
        while self.running and (found := self.steps()) < steps:
            assert time.monotonic() < limit, f"seed {SEED}: {self.output} is at step {found} of {steps}"
            time.sleep(0.01)  # progress of another process: nothing to wait on

    def finish(self, timeout_s: float = 240) -> list[float | None]:
        """Wait for its end; its losses, once it is sure that every sample was trained once an epoch."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = None
        log = self.output.with_suffix(".log").read_text()
        assert code == 0, f"seed {SEED}, exit code {code} (None: it hung): {log}"
        records = read(self.output / "metrics.jsonl")
        trained = [(batch.epoch, sample) for record in records for batch in record.batches for sample in batch.samples]
        assert sorted(trained) == [(epoch, sample) for epoch in range(self.epochs) for sample in range(NUM_SAMPLES)]
        assert len(records) > 20
        return [record.loss for record in records]

    def close(self) -> None:
        """End it if it still runs."""
        if self.running:
            self.process.kill()
            self.process.wait()


def disturb(trainers: Sequence[Trainer], repetitions: int, fault: Callable[[random.Random], None]) -> int:
    """Do `fault` at random moments, each after every trainer has made progress; how often it was done."""
    rng = random.Random(SEED)
    done = 0
    while done < repetitions and all(trainer.running for trainer in trainers):
        for trainer, goal in [(trainer, trainer.steps() + rng.randint(1, 3)) for trainer in trainers]:
            trainer.wait_for(goal)
        if all(trainer.running for trainer in trainers):
            time.sleep(rng.uniform(0, 0.05))
            fault(rng)
            done += 1
    return done


def settled(daemon: Daemon) -> None:
    """No slot, session or request is left once the trainer is gone."""
    limit = time.monotonic() + 10
    while (status := daemon.status()).sessions or status.slots["free"] != NUM_SLOTS or status.queued:
        assert time.monotonic() < limit, status
        time.sleep(0.05)
