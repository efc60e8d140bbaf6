"""`specd start`: what it refuses, what it says when it is ready, and how it is detached."""

from __future__ import annotations

import json
import os
import re

import pytest
from msgspec.structs import replace

from daemons import REPORT, specd_command, synthetic
from specd.cli import start
from specd.cli.main import run
from specd.client.seats import thin
from specd.config.settings import DaemonConfig
from specd.protocol.capture import FP8
from specd.protocol.contract import ReplayInfo

KEPT_AS_FP8 = ["--model", "smollm2-135m", "--replay-ram-gb", "1", "--replay-encoding", FP8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no target given"),
        (["--model", "smollm2-135m", "--set", "ring.slot=4"], "unknown field `slot`"),
        (["--model", "smollm2-135m", "--backend", "gguf"], "gguf"),
        (["--model", "smollm2-135m", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--model", "smollm2-135m", "--depth", "3"], "--depth 3 says how deep"),
        (["--model", "smollm2-135m", "--trainers", "4", "--slots", "9"], "--slots 9 with --trainers 4: expected one"),
        (["--model", "smollm2-135m", "--replay", "states"], "states without a size: say how much"),
        (["--model", "smollm2-135m", "--replay-gb", "5"], "replay.gb=5 without a directory: say where"),
        (["--model", "smollm2-135m", "--replay", "", "--replay-gb", "5"], "replay.gb=5 without a directory"),
        (["--model", "smollm2-135m", "--replay-ram-gb", "-1"], "replay.ram_gb"),
        (["--model", "smollm2-135m", "--replay-encoding", "fp4"], "`$.replay.encoding`"),
        (["--model", "smollm2-135m", "--replay-encoding", FP8], "float8_e4m3fn, and nothing is kept: say where, as"),
        ([*KEPT_AS_FP8, "--exact"], "rounds the states that are read, and the target is exact: leave out --exact"),
        ([*KEPT_AS_FP8, "--set", f"capture.dtype={FP8}"], "slots hold codes already, which are kept as they are"),
    ],
)
def test_start_refuses_wrong_settings(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["start", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_ready_line_says_where_what_and_how_much() -> None:
    line = start.ready_line(REPORT)
    assert "\n" not in line
    for part in ("ipc:///tmp/x/daemon.sock", "tiny", "8 slots", "41,943,040 bytes", "40 MiB"):
        assert part in line
    assert "(40 MiB) for 4 trainers at depth 1 · " in start.ready_line(replace(REPORT, max_sessions=4))
    info = ReplayInfo(cells=9, used=3, cell_bytes=5 << 20)
    assert " · replay 3 of 9 cells hold a batch, 5 MiB each · " in start.ready_line(replace(REPORT, replay=info))
    assert "(40 MiB) for 1 trainer at depth 7 · " in start.ready_line(replace(REPORT, max_sessions=1))


@pytest.mark.parametrize(("options", "slots"), [(["4"], 12), (["4", "--depth", "1"], 8), (["3", "--depth", "0"], 3)])
def test_a_ring_for_trainers_is_exactly_as_large_as_they_need(
    options: list[str], slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With W sessions, W·D of the slots are shared: D more for each than its own one."""
    served: list[DaemonConfig] = []
    monkeypatch.setattr("specd.daemon.serve.serve", lambda daemon, on_ready: served.append(daemon))
    assert run(["start", "--model", "smollm2-135m", "--trainers", *options]) == 0
    (ring,) = (daemon.ring for daemon in served)
    assert (ring.slots, ring.max_sessions) == (slots, int(options[0]))
    depth = slots // ring.max_sessions - 1
    assert not thin(ring.slots, ring.slots - ring.max_sessions, depth + 1, ring.max_sessions)


def test_resident_bytes_ignores_the_dead() -> None:
    own = start.resident_bytes({os.getpid()})
    assert own > 1 << 20
    assert start.resident_bytes({1 << 30}) == 0


def test_a_daemon_is_started_asked_and_stopped(endpoint: str) -> None:
    begun = specd_command(*synthetic(endpoint))
    assert begun.returncode == 0, begun.stderr
    assert begun.stdout.count("\n") == 1
    assert f"specd ready at {endpoint}" in begun.stdout
    report = json.loads(specd_command("status", "--endpoint", endpoint, "--json").stdout)
    assert report["state"] == "serving"
    assert report["ring"]["num_slots"] == 4
    refused = specd_command(*synthetic(endpoint))
    assert refused.returncode == 1
    assert re.fullmatch(r"specd: error: a daemon already owns .*\n", refused.stderr.splitlines(keepends=True)[-1])
    ended = specd_command("stop", "--endpoint", endpoint)
    assert ended.returncode == 0, ended.stderr
    assert specd_command("status", "--endpoint", endpoint, "--timeout", "0.2").returncode == 1


def test_detached_failure_reaches_the_terminal(endpoint: str) -> None:
    result = specd_command(*synthetic(endpoint), "--set", "target.model=/no/such/directory")
    assert result.returncode != 0
    assert "/no/such/directory" in result.stderr
    assert "Traceback" not in result.stderr
