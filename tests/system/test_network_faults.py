"""Bad networks: real daemons and trainers in two namespaces, with delay, loss, little bandwidth, or no link at all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import networks
from faults import NUM_SLOTS, PROGRESS_S, SEED, TARGET, Trainer, daemons, write_data
from networks import NEAR, Networks
from scripted import wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(networks.missing()), reason=networks.missing()),
]
ENDPOINT = f"tcp://{NEAR}:7070"
SUPPORT = Path(__file__).parents[1] / "support"
LARGE = "synthetic:hidden=4096,layers=6,vocab=128"
LARGE_TOKENS = 512
"""16 MiB of two taps."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tokens.jsonl")


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float | None]:
    """The losses of a run without a network."""
    with daemons() as start:
        return Trainer(tmp_path_factory.mktemp("reference") / "run", data, [start("r").endpoint], epochs=1).finish()


Place = Callable[..., Networks]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Makes the two networks, with a daemon in the near one that serves `model`."""
    with contextlib.ExitStack() as ends:
        hidden = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="sn-", dir="/tmp")))

        def make(model: str = TARGET, slot_tokens: int = 128, **facts: Any) -> Networks:
            made = ends.enter_context(Networks(hidden, seed=SEED, **facts))
            command = [*made.near, sys.executable, "-m", "specd", "start", "--model", model, "--exact", "--insecure"]
            command += ["--endpoint", ENDPOINT, "--slots", str(NUM_SLOTS), "--slot-tokens", str(slot_tokens)]
            log = ends.enter_context((tmp_path / "daemon.log").open("wb"))
            env = {**os.environ, "XDG_RUNTIME_DIR": str(hidden)}
            daemon = subprocess.Popen(command, stdout=log, stderr=log, env=env)

            def end() -> None:
                daemon.send_signal(signal.SIGINT)
                daemon.wait(30)

            ends.callback(end)
            ask = [*made.near, sys.executable, "-m", "specd", "status", "--endpoint", ENDPOINT]
            wait_for(lambda: subprocess.run(ask, capture_output=True, check=False).returncode == 0)
            return made

        yield make


class FarTrainer(Trainer):
    """A trainer in the far network."""

    def __init__(self, where: Networks, output: Path, data: Path) -> None:
        self._where = where
        super().__init__(output, data, [ENDPOINT], epochs=1, transport="bytes")

    def start(self, *, resume: bool = False) -> None:
        if not resume:
            self.command = [*self._where.far, *self.command]
        super().start(resume=resume)


@pytest.mark.parametrize(
    ("rtt_s", "loss"),
    [(0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (1.0, 0.0), (0.01, 0.01), (0.05, 0.05), (0.1, 0.1), (1.0, 0.01), (1.0, 0.1)],
)
def test_it_trains_whatever_the_delay_and_the_loss(
    rtt_s: float, loss: float, place: Place, data: Path, tmp_path: Path, reference: list[float | None]
) -> None:
    trainer = FarTrainer(place(rtt_s=rtt_s, loss=loss), tmp_path / "run", data)
    begin = time.monotonic()
    try:
        assert trainer.finish(800) == reference
    finally:
        trainer.close()
    print(f"RTT {rtt_s:g} s, loss {loss:.0%}: {len(reference)} steps in {time.monotonic() - begin:.0f} s")


def far(where: Networks, count: int) -> subprocess.Popen[str]:
    program = [sys.executable, str(SUPPORT / "far_subscriber.py"), ENDPOINT, str(count), str(LARGE_TOKENS), LARGE]
    return subprocess.Popen([*where.far, *program], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("rtt_s", "loss"), [(0.0, 0.0), (0.1, 0.0), (0.02, 0.01)])
def test_batches_of_16_mib_come_over_4_mbit_s(rtt_s: float, loss: float, place: Place) -> None:
    with far(place(LARGE, LARGE_TOKENS, mbit_s=4.0, rtt_s=rtt_s, loss=loss), 3) as program:
        output, _ = program.communicate(timeout=800)
    found = json.loads(output)
    print(f"RTT {rtt_s:g} s, loss {loss:.0%}: {found}")
    assert len(found["arrived"]) == 3
    assert (found["resubmitted"], found["reconnects"]) == (0, 0)


@pytest.mark.parametrize("down_s", [12.0, 45.0])
def test_a_large_batch_survives_a_link_that_is_down_for_a_while(down_s: float, place: Place) -> None:
    where = place(LARGE, LARGE_TOKENS, mbit_s=20.0, rtt_s=0.02)
    with far(where, 6) as program:
        time.sleep(15)  # past its start, in one of the transfers of 7 s
        where.up = False
        time.sleep(down_s)
        where.up = True
        output, _ = program.communicate(timeout=800)
    found = json.loads(output)
    print(f"down {down_s:g} s: {found}")
    assert len(found["arrived"]) == 6


def test_a_trainer_ends_soon_though_its_link_is_down(place: Place, data: Path, tmp_path: Path) -> None:
    where = place(rtt_s=0.02)
    trainer = FarTrainer(where, tmp_path / "run", data)
    try:
        trainer.wait_for(5)
        where.up = False
        time.sleep(1)
        trainer.process.send_signal(signal.SIGTERM)
        begin = time.monotonic()
        trainer.process.wait(PROGRESS_S)
        took = time.monotonic() - begin
    finally:
        trainer.close()
    print(f"ended {took:.1f} s after SIGTERM")
    assert took < 5.0
