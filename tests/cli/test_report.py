"""`specd report` as a person types it: one run, several, a file of one's own, and a directory that is no run."""

from __future__ import annotations

from pathlib import Path

import pytest

from specd.cli.main import run
from step_records import make_run


def test_one_run_and_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (str(make_run(tmp_path / name, steps=2)) for name in ("a", "b"))
    both = tmp_path / "both.html"
    for command, page in (
        (["report", first], tmp_path / "a" / "report.html"),
        (["report", first, second], tmp_path / "a" / "comparison.html"),
        (["report", first, second, "--to", str(both)], both),
    ):
        assert run(command) == 0
        assert f"report written to {page}" in capsys.readouterr().out
        assert page.read_text().startswith("<!doctype html>")


def test_a_directory_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = str(make_run(tmp_path / "a", steps=1))
    assert run(["report", good, str(tmp_path / "none")]) == 1
    assert f"cannot read {tmp_path / 'none'}/run.json" in capsys.readouterr().err
    assert run(["report", good, good]) == 2
    assert "is there twice" in capsys.readouterr().err
