"""`specd train --dry-run` on a terminal of 80 columns."""

from __future__ import annotations

from pathlib import Path

import pytest

from specd.cli.main import run


def test_it_fits_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-q", "train", "dflash", "--preset", "smollm2-135m", "--set", "data.max_samples=40", "--dry-run"]
    arguments += ["--endpoint", f"ipc://{tmp_path}/none.sock", "--output", str(tmp_path / "x")]
    assert run(arguments) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all checks passed; nothing was loaded, nothing was written"
    assert max(len(line) for line in lines[1:]) <= 80
    assert not (tmp_path / "x").exists()
