"""`specd bench replay` in small: pairs of rounds, what was kept is read, and the disk is given back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specd.cli.main import run
from specd.replay.files import NAME

TINY = "synthetic:hidden=32,layers=8,vocab=128,ms=2"


def test_rounds_of_a_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--gb", "0.02", "--slot", "64K", "--model", TINY, "--tokens", "64", "--rounds", "2", "--count", "8"]
    assert run(["bench", "replay", str(tmp_path / "d"), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    behind = found["behind"]
    assert len(behind["by_round"]) == behind["rounds"] == 2
    assert behind["written"] + round(behind["skipped"] * 16) == 16
    assert behind["hits"] >= 0.98
    assert min(behind["computed"], behind["kept"], behind["replayed"], behind["ratio"]) > 0
    assert behind["low"] <= behind["ratio"] <= behind["high"]
    assert not (tmp_path / "d" / NAME).exists()
    (tmp_path / NAME).touch()
    assert run(["bench", "replay", str(tmp_path), "--gb", "1"]) == 2
    assert "holds states already" in capsys.readouterr().err
    assert run(["bench", "replay"]) == 2
    assert "expected DIR with --gb, or --ram-gb" in capsys.readouterr().err
