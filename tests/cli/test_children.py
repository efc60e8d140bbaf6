"""Commands as processes: they end in order, or by force, and what a daemon said is told."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from specd.cli.children import Children, ready
from specd.errors import DaemonError
from specd.train.interrupt import Interrupt


def test_a_daemon_that_does_not_start_is_told_of(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Children(Interrupt()) as children, log.open("wb") as said:
        child = children.start(
            ["start", "--model", "none", "--endpoint", f"ipc://{tmp_path}/d"],
            signal.SIGINT,
            stdout=subprocess.PIPE,
            stderr=said,
        )
        with pytest.raises(
            DaemonError, match="the daemon did not start: specd: error: model 'none': expected a preset"
        ):
            ready(child, log)
        assert repr(children) == "1 processes"
        assert not children.running


def test_who_does_not_end_in_time_is_killed() -> None:
    with Children(Interrupt()) as children:
        deaf, quick = (children.start(["--version"], number) for number in (signal.SIGWINCH, signal.SIGKILL))
        deaf.send_signal(signal.SIGSTOP)
        assert children.end([quick], settle_s=30) is False
        assert children.running
        assert children.end([deaf], settle_s=0.0) is True
        assert (deaf.returncode, quick.returncode) == (-signal.SIGKILL, -signal.SIGKILL)
