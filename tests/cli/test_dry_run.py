"""`specd train --dry-run` on a terminal of 80 columns, and with a daemon that names its target."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemons import REPORT
from specd.cli import dry_run
from specd.cli.main import run
from specd.config.settings import RunConfig
from specd.errors import ConfigError


def test_it_fits_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-q", "train", "dflash", "--preset", "smollm2-135m", "--set", "data.max_samples=40", "--dry-run"]
    arguments += ["--endpoint", f"ipc://{tmp_path}/none.sock", "--output", str(tmp_path / "x")]
    assert run(arguments) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all checks passed; nothing was loaded, nothing was written"
    assert max(len(line) for line in lines[1:]) <= 80
    assert not (tmp_path / "x").exists()


def test_a_daemon_is_asked_for_its_target(
    daemon: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def source(name: str, config: RunConfig) -> None:
        raise ConfigError(f"looked for {name}")

    monkeypatch.setattr(dry_run, "_source", source)
    assert run(["-q", "train", "dflash", "--endpoint", daemon, "--dry-run"]) == 2
    assert REPORT.contract is not None
    assert f"looked for {REPORT.contract.model}\n" in capsys.readouterr().err
