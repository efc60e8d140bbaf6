"""Faults on GPUs: whatever is killed, nothing hangs, every sample is trained once, the losses stay the same, and device
memory returns to its level.

Several trainers draw from one daemon at once, over different transports, so that each fault hits all of them. Each test
does its faults once, or as often as SPECD_FAULTS says: then on two daemons, or with two trainers, at the same time.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from faults import ASKED, SEED, TARGET, Daemon, Trainer, daemons, settled, write_data
from levels import Levels
from samples import batch
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig, TargetConfig
from specd.metrics import Stats
from specd.protocol.batch import Batch, slot_layout
from specd.protocol.capture import CaptureSpec
from specd.targets.base import CaptureJob
from specd.targets.synthetic import SyntheticTarget
from specd.train.journal import read

FIRST, SECOND = "cuda:0", "cuda:1"
REPETITIONS = ASKED or 1
LANES = min(2, REPETITIONS)
SHARES = [REPETITIONS // LANES + (lane < REPETITIONS % LANES) for lane in range(LANES)]
"""Faults of each lane; lanes run at the same time."""
EPOCHS = 3 + REPETITIONS // 4  # so that none of the trainers has ended when the last of them has begun
LEASE_S = 10.0  # CUDA and NCCL hold up a starting trainer for longer than the second of the tests on CPUs
ATTACH_S = 90.0
"""All trainers of a daemon have a session again within this after a fault."""
NOTICED_S = 5.0
"""A trainer notices a longer wait for one batch than this."""
SLACK = 256 << 20
"""Bytes a device's level may differ by: less than one process's context."""
SPEC = CaptureSpec(taps=(1, 4), dtype="float32")


class Carried(NamedTuple):
    """How one trainer gets its states."""

    transport: str
    borrow: bool = False


COPIED, BORROWED, SHM, NCCL = Carried("cuda_ipc"), Carried("cuda_ipc", borrow=True), Carried("shm"), Carried("nccl")


class Bystander:
    """A trainer on a thread of this process: takes batch after batch, and compares each with what the target gives."""

    def __init__(self, daemon: Daemon, transport: str, device: str) -> None:
        self.longest_s = 0.0
        self.served = threading.Event()
        self._config = SubscriberConfig(
            endpoints=(daemon.endpoint,), transport=transport, depth=2, timeout_s=60, connect_s=60
        )
        self._device = device
        self._end = threading.Event()
        self._thread = ThreadPoolExecutor(1)
        self._outcome = self._thread.submit(self._train)

    def finish(self) -> Stats:
        """Stop it; returns its statistics, or raises its error."""
        self.close()
        return self._outcome.result()

    def close(self) -> None:
        self._end.set()
        self._thread.shutdown()

    def _train(self) -> Stats:
        batches = [batch(index) for index in range(12)]
        expected = [states(one) for one in batches]

        def endless() -> Iterator[Batch]:
            while not self._end.is_set():
                yield from batches

        with Subscriber(self._config, SPEC, device=self._device) as source:
            asked = time.monotonic()
            for number, delivery in enumerate(source.stream(endless())):
                self.longest_s = max(self.longest_s, time.monotonic() - asked) if number else 0.0
                assert delivery.taps is not None
                assert torch.equal(delivery.taps.cpu(), expected[number % len(batches)]), f"delivery {number} differs"
                self.served.set()
                self._end.wait(0.05)  # others want the target, too
                asked = time.monotonic()
            return source.stats()


def states(of: Batch) -> torch.Tensor:
    """The taps of a batch as the daemons' target computes them, on the CPU."""
    target = SyntheticTarget(TargetConfig(model=TARGET, device="cpu"))
    layout = slot_layout(SPEC, target.contract.hidden_size, of.num_tokens)
    slot = bytearray(layout.nbytes)
    target.run([CaptureJob(tokens=of.tokens, lengths=of.lengths, spec=SPEC, layout=layout, slot=memoryview(slot))])
    (taps,) = layout.tensors
    return torch.frombuffer(slot, dtype=torch.float32, count=taps.nbytes // 4, offset=taps.offset).view(taps.shape)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tokens.jsonl")


@pytest.fixture(scope="module")
def levels() -> Callable[[str], Levels]:
    """The level of the first device and another one before the first process of these tests was started."""
    found = {FIRST: Levels([FIRST], SLACK)}
    if torch.cuda.device_count() > 1:
        found[SECOND] = Levels([FIRST, SECOND], SLACK)
    return found.__getitem__


@pytest.fixture(scope="module")
def reference(
    levels: Callable[[str], Levels], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], object]]:
    """The losses of a run without faults, its target in its own process; it runs beside the first test."""
    output = tmp_path_factory.mktemp("reference") / "run"
    trainer = Trainer(output, data, [], epochs=EPOCHS, device=FIRST)
    found: list[object] = []

    def losses() -> object:
        if not found:
            found.append(trainer.finish())
        return found[0]

    yield losses
    trainer.close()


@pytest.fixture
def start() -> Iterator[Callable[[str], Daemon]]:
    """Starts a daemon by name; all of them end with the test."""
    with daemons(FIRST, lease_s=LEASE_S) as starter:
        yield starter


Train = Callable[[Daemon, str, Carried, str], Trainer]


@pytest.fixture
def train(data: Path, tmp_path: Path) -> Iterator[Train]:
    """Starts a trainer of a daemon by name; all of them end with the test."""
    with contextlib.ExitStack() as running:

        def starter(daemon: Daemon, name: str, carried: Carried, device: str) -> Trainer:
            trainer = Trainer(
                tmp_path / name,
                data,
                [daemon.endpoint],
                epochs=EPOCHS,
                device=device,
                transport=carried.transport,
                borrow=carried.borrow,
            )
            running.callback(trainer.close)
            return trainer

        yield starter


@pytest.mark.parametrize(
    ("device", "carried"),
    [
        pytest.param(FIRST, (COPIED, BORROWED, SHM), id="one_gpu", marks=pytest.mark.gpu(1)),
        pytest.param(SECOND, (COPIED, NCCL), id="two_gpus", marks=pytest.mark.gpu(2)),
    ],
)
@pytest.mark.parametrize("victim", ["worker", "control"])
def test_daemon_killed(
    victim: str,
    device: str,
    carried: tuple[Carried, ...],
    levels: Callable[[str], Levels],
    reference: Callable[[], object],
    start: Callable[[str], Daemon],
    train: Train,
) -> None:
    def disturbed(lane: int) -> tuple[Daemon, list[Trainer], int]:
        """A daemon, its trainers, and how often it was killed."""
        daemon, rng = start(f"d{lane}"), random.Random(SEED + lane)
        names = [f"{lane}-{one.transport}{'-borrowed' * one.borrow}" for one in carried]
        trainers = [train(daemon, name, one, device) for name, one in zip(names, carried, strict=True)]
        for done in range(SHARES[lane]):
            if not drawing(daemon, trainers, rng):
                return daemon, trainers, done
            if victim == "control":
                daemon.process.kill()
                daemon.restart()
            else:
                pid = daemon.status().worker_pid
                assert pid > 0
                os.kill(pid, signal.SIGKILL)
        return daemon, trainers, SHARES[lane]

    with ThreadPoolExecutor(LANES) as lanes:
        outcomes = list(lanes.map(disturbed, range(LANES)))
    for daemon, trainers, _ in outcomes:
        for trainer in trainers:
            assert trainer.finish() == reference(), f"seed {SEED}: {trainer.output.name}"
            assert sum(record.reconnects for record in read(trainer.output / "metrics.jsonl")) >= 1
        settled(daemon)
        daemon.close()
    done = [found for _, _, found in outcomes]
    assert done == SHARES, f"seed {SEED}: the runs ended after {done} of {SHARES} faults"
    levels(device).check()


def drawing(daemon: Daemon, trainers: list[Trainer], rng: random.Random) -> bool:
    """Wait for a random moment at which all trainers draw from the daemon; False when one of them has ended."""
    limit = time.monotonic() + ATTACH_S
    while (status := daemon.status()).worker_pid == 0 or len(status.sessions) < len(trainers):
        if not all(trainer.running for trainer in trainers):
            return False
        assert time.monotonic() < limit, f"seed {SEED}: not all trainers came back: {status}"
        time.sleep(0.05)
    for trainer, goal in [(trainer, trainer.steps() + rng.randint(1, 6)) for trainer in trainers]:
        trainer.wait_for(goal)
    time.sleep(rng.uniform(0, 0.05))
    return all(trainer.running for trainer in trainers)


@pytest.mark.parametrize(
    ("device", "killed", "other"),
    [
        pytest.param(FIRST, COPIED, "shm", id="cuda_ipc-shm", marks=pytest.mark.gpu(1)),
        pytest.param(SECOND, COPIED, "nccl", id="cuda_ipc-nccl", marks=pytest.mark.gpu(2)),
        pytest.param(SECOND, NCCL, "cuda_ipc", id="nccl-cuda_ipc", marks=pytest.mark.gpu(2)),
    ],
)
def test_killed_trainers_do_not_disturb_another(
    device: str,
    killed: Carried,
    other: str,
    levels: Callable[[str], Levels],
    reference: Callable[[], object],
    start: Callable[[str], Daemon],
    train: Train,
) -> None:
    daemon = start("a")
    trainers = [train(daemon, f"{lane}-{killed.transport}", killed, device) for lane in range(LANES)]
    bystander = Bystander(daemon, other, device)

    def disturb(lane: int) -> None:
        trainer, rng = trainers[lane], random.Random(SEED + lane)
        for _ in range(SHARES[lane]):
            trainer.wait_for(trainer.steps() + rng.randint(1, 6))
            time.sleep(rng.uniform(0, 0.05))
            assert trainer.running, f"seed {SEED}: {trainer.output.name} ended before it was killed"
            trainer.kill_and_resume()

    try:
        assert bystander.served.wait(60), bystander.finish()
        for trainer in trainers:
            trainer.wait_for(3)
        assert {session.transport for session in daemon.status().sessions} == {killed.transport, other}
        with ThreadPoolExecutor(LANES) as lanes:
            list(lanes.map(disturb, range(LANES)))
        for trainer in trainers:
            assert trainer.finish() == reference(), f"seed {SEED}: {trainer.output.name}"
    finally:
        bystander.close()
    stats = bystander.finish()
    assert stats.batches > 10 * REPETITIONS
    assert (stats.reconnects, stats.resubmitted) == (0, 0)
    assert bystander.longest_s < NOTICED_S
    settled(daemon)
    daemon.close()
    levels(device).check()
