"""`specd stop`: a daemon that stays, one that is forced, and one of another host."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest
import zmq

from daemons import REPORT, answering
from specd.cli import stop
from specd.cli.main import run


def test_stop_gives_up_on_a_daemon_that_stays(
    stubborn: tuple[str, subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint, process = stubborn
    assert run(["stop", "--endpoint", endpoint, "--timeout", "0.3"]) == 1
    assert "--force" in capsys.readouterr().err
    assert process.poll() is None


def test_force_ends_a_daemon_that_stays(
    stubborn: tuple[str, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, process = stubborn
    monkeypatch.setattr(stop, "GRACE_S", 0.2)
    assert run(["stop", "--endpoint", endpoint, "--timeout", "0.3", "--force"]) == 0
    assert process.wait() == -signal.SIGKILL


def test_stop_signals_only_the_process_that_listens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stubborn: tuple[str, subprocess.Popen[str]]
) -> None:
    """A daemon that names a process that is not its own gets it neither stopped nor killed."""
    _, bystander = stubborn
    endpoint = f"ipc://{tmp_path}/liar.sock"
    with answering(endpoint, msgspec.structs.replace(REPORT, pid=bystander.pid)):
        assert run(["stop", "--endpoint", endpoint, "--timeout", "0.3", "--force"]) == 1
    assert f"calls itself process {bystander.pid}, and process {os.getpid()} listens" in capsys.readouterr().err
    assert bystander.poll() is None


def test_stop_never_signals_what_may_be_another_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as probe:
        port = probe.bind_to_random_port("tcp://127.0.0.1")
    with answering(f"tcp://127.0.0.1:{port}", REPORT):
        assert run(["stop", "--endpoint", f"tcp://127.0.0.1:{port}"]) == 1
    assert f"process {os.getpid()}" in capsys.readouterr().err
