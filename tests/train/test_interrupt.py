"""Signals of a training run: which are handled, and what checkpoint they leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runs import Source, curve, records, run
from specd.protocol.batch import Batch
from specd.train.interrupt import SIGNALS, Interrupt
from specd.train.journal import StepRecord

LISTENER = """
import signal
from specd.train.interrupt import Interrupt

before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
with Interrupt() as interrupt:
    signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGINT)
    print("ignored", interrupt.received)
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        print("heard", interrupt.received)
assert all(signal.getsignal(number) is handler for number, handler in before.items())
"""


def test_signals_that_the_shell_ignores_stay_ignored() -> None:
    """As under nohup, which ignores SIGHUP, and in the background job of a script, which ignores SIGINT."""
    script = 'trap "" HUP INT; exec "$0" -c "$1"'
    ended = subprocess.run(["sh", "-c", script, sys.executable, LISTENER], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["ignored 0", f"heard {signal.SIGTERM.value}"]


@pytest.fixture
def nothing_ignored() -> Iterator[None]:
    """Signals as in the foreground, even where the tests run under nohup or behind a script."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("nothing_ignored")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_leaves_a_checkpoint_of_the_last_step(tmp_path: Path, number: signal.Signals) -> None:
    run(tmp_path / "whole")

    def interrupted(batch: Batch) -> None:
        if (batch.epoch, batch.index) == (0, 4):
            os.kill(os.getpid(), number)

    with Interrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", source=Source(interrupted), interrupt=interrupt)
        assert interrupt.received == number
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000001"]
    run(tmp_path / "cut", resume=True)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


@pytest.mark.usefixtures("nothing_ignored")
def test_a_signal_inside_a_step_waits_for_its_end(tmp_path: Path) -> None:
    class Stopper:
        def step(self, record: StepRecord) -> None:
            if record.step == 3:
                os.kill(os.getpid(), signal.SIGINT)

        def validated(self, found: object) -> None:
            raise NotImplementedError

    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupt=interrupt, sinks=[Stopper()])
    assert [record.step for record in records(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()
