"""Daemons for the verbs to talk to, and a terminal that is wide enough."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from chats import CHATML, data_model
from daemons import REPORT, answering, specd_command

STUBBORN = """
import os, signal, sys
import msgspec
from daemons import REPORT, answering
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
with answering(sys.argv[1], msgspec.structs.replace(REPORT, pid=os.getpid())):
    print("ready", flush=True)
    signal.pause()
"""
PLUGIN = Path(__file__).parents[1] / "plugin"


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target's directory as far as its data goes."""
    return data_model(tmp_path_factory.mktemp("model"), CHATML)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that no other test has, and a terminal without wishes for colour."""
    monkeypatch.setenv("SPECD_CACHE", str(tmp_path / "cache"))
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def example(tmp_path: Path) -> Iterator[None]:
    """What `pip install tests/plugin` leaves: metadata with its entry points, and its packages on the path."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    info = tmp_path / "site" / "specd_example-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    added = [str(info.parent), str(PLUGIN)]
    sys.path[:0] = added
    yield
    sys.path[:] = [path for path in sys.path if path not in added]
    for package in ("specd_toy", "specd_carrier"):
        sys.modules.pop(package, None)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[str]:
    """Endpoint of a daemon that answers with REPORT."""
    endpoint = f"ipc://{tmp_path}/d.sock"
    with answering(endpoint, REPORT):
        yield endpoint


@pytest.fixture
def stubborn(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Endpoint and process of a daemon that heeds no signal but SIGKILL."""
    endpoint = f"ipc://{tmp_path}/d.sock"
    command = [sys.executable, "-c", STUBBORN, endpoint]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
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
