"""Sweeps with real processes: what they share, and what becomes of them when one is killed, or all are interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from faults import write_data
from specd.cli import sweeping
from specd.cli.fleet import Command, Fleet
from specd.cli.sweeping import Trainer, go
from specd.train.checkpoint import finished_checkpoints
from specd.train.journal import StepRecord, read

FILE = """
base:
  data: {path: tokens.jsonl, batch_tokens: 80, max_length: 40}
  train: {epochs: 500, device: cpu, threads: 1, save_every: 5, dtype: float32}
  draft.attention: sdpa
runs:
  narrow: {method: dflash, draft: {num_layers: 1, num_taps: 2, block_size: 4, num_anchors: 4, mask_token_id: 255}}
  wide: {method: dspark, draft: {num_layers: 1, num_taps: 4, block_size: 4, num_anchors: 4, mask_token_id: 255}}
  eagle: {method: eagle3, draft: {num_steps: 3}}
"""
SWEEP = [sys.executable, "-m", "specd", "sweep", "three.yaml", "-m", "synthetic:hidden=32,layers=8,vocab=256,ms=100"]
SWEEP += ["--lag-gb", "0.01"]
LIMIT_S = 120.0
SHARED = 10
"""Batches for which another run made the forward, before one is killed."""


def steps_of(run: Path) -> list[StepRecord]:
    return read(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []


def test_one_is_killed_all_are_interrupted_and_all_go_on(tmp_path: Path) -> None:
    write_data(tmp_path / "tokens.jsonl")
    (tmp_path / "three.yaml").write_text(FILE)
    runs = {name: tmp_path / "runs" / "three" / name for name in ("narrow", "wide", "eagle")}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    process = subprocess.Popen(SWEEP, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    pids: dict[str, int] = {}
    line = ""
    while len(pids) < len(runs):
        line = process.stdout.readline().decode()
        assert line, process.communicate()
        if found := re.match(r"(\w+): \w+, cpu, training, process (\d+); log ", line):
            pids[found[1]] = int(found[2])
    limit = time.monotonic() + LIMIT_S
    while sum(record.shared for path in runs.values() for record in steps_of(path)) < SHARED:
        assert time.monotonic() < limit, process.communicate()
        time.sleep(0.05)  # progress of other processes: nothing to wait on
    os.kill(pids["wide"], signal.SIGKILL)
    while "wide: killed by SIGKILL after step" not in line:
        line = process.stdout.readline().decode()
        assert line, process.communicate()
    assert line.endswith("; the others go on\n")
    process.send_signal(signal.SIGINT)
    said, errors = (text.decode() for text in process.communicate(timeout=LIMIT_S))
    assert process.returncode == 130, errors
    assert "interrupted: 2 runs end in order, each keeps what it has" in said
    assert (
        "go on:     specd sweep three.yaml -m synthetic:hidden=32,layers=8,vocab=256,ms=100 --lag-gb 0.01 --resume"
        in errors
    )
    for name in ("narrow", "eagle"):
        if kept := len(steps_of(runs[name])):
            assert finished_checkpoints(runs[name] / "checkpoints")[-1][0] == kept
    for pid in pids.values():
        assert not Path(f"/proc/{pid}").exists()

    steps = {name: steps_of(path) for name, path in runs.items()}
    batches = sum(map(len, steps.values()))
    shared = sum(record.shared for records in steps.values() for record in records)
    assert f"{batches:,} batches were trained from {batches - shared:,} forwards of the target: {shared:,} (" in said
    assert shared >= SHARED

    three = FILE.splitlines()
    (tmp_path / "three.yaml").write_text(
        "\n".join(line for line in three if "narrow" not in line and "eagle" not in line)
    )
    most = len(steps["wide"]) + 3
    again = [*SWEEP, "--resume", "--set", f"train.max_steps={most}"]
    done = subprocess.run(
        again, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done
    assert len(read(runs["wide"] / "metrics.jsonl")) == most
    assert "dspark, cpu, finished" in done.stdout
    assert "next:  specd report runs/three/wide\n       specd eval runs/three/wide\n" in done.stdout


def test_what_was_trained_is_decoded_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[Command]] = []

    class Noted(Fleet):
        def run(self, commands: list[Command], doing: str) -> None:  # type: ignore[override]
            ran.append(commands)
            for command in commands:
                command.run.state = doing
            if doing == "training":
                self.failed.append(commands[1].run)

    monkeypatch.setattr("specd.cli.fleet.Fleet", Noted)
    monkeypatch.setattr(sweeping, "see_daemons", lambda runs: [])
    runs = [
        Trainer(name, {"method": "dflash", "output": str(tmp_path / name)}, "smollm2-135m", device)
        for name, device in (("a", "cpu"), ("b", "cpu"), ("c", "cuda:3"))
    ]
    with pytest.raises(BaseException, match="1"):
        go(runs, {}, tmp_path, 40, "specd sweep again")
    trained, *decoded = ran
    assert [command.arguments[:2] for command in trained] == [["train", "dflash"]] * 3
    assert trained[0].arguments[-3:] == ["--resume", "--preset", "smollm2-135m"]
    assert [command.arguments for (command,) in decoded] == [
        ["eval", str(tmp_path / "a"), "--limit", "40", "--device", "cpu"],
        ["eval", str(tmp_path / "c"), "--limit", "40", "--device", "cuda:3"],
    ]
    assert "go on:     specd sweep again" in capsys.readouterr().out
