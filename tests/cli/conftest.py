"""Daemons for the verbs to talk to, and a terminal that is wide enough."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from daemons import REPORT, answering, specd_command


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[str]:
    """Endpoint of a daemon that answers with REPORT."""
    endpoint = f"ipc://{tmp_path}/d.sock"
    with answering(endpoint, REPORT):
        yield endpoint


@pytest.fixture
def stubborn(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Endpoint and process of a daemon that heeds no signal but SIGKILL."""
    code = "import signal; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        endpoint = f"ipc://{tmp_path}/d.sock"
        with answering(endpoint, msgspec.structs.replace(REPORT, pid=process.pid)):
            yield endpoint, process
        process.kill()


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    """An endpoint whose daemon, if a test leaves one, is ended."""
    place = tmp_path / "run"
    place.mkdir(mode=0o700)
    name = f"ipc://{place}/d.sock"
    yield name
    specd_command("stop", "--endpoint", name, "--timeout", "0.5", "--force")
