"""`specd demo`: it cleans up, and replaces nothing but runs."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import typer

from daemons import specd_command, synthetic
from specd.cli import demo
from specd.cli.main import run
from specd.train.interrupt import Interrupt


def test_demo_leaves_no_daemon_behind_when_it_is_interrupted(endpoint: str, tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background it is ignored

    def interrupted() -> None:
        with Interrupt() as interrupt, demo.Stage(interrupt) as stage:
            stage.serve(tmp_path / "log", *(argument for argument in synthetic(endpoint) if argument != "--detach"))
            assert specd_command("status", "--endpoint", endpoint).returncode == 0
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert specd_command("status", "--endpoint", endpoint, "--timeout", "0.2").returncode == 1


def test_demo_replaces_no_directory_that_holds_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "run" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert run(["demo", "--quick", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"specd: error: \S+ exists and holds no run \(run\.json\).*\n", error)
    assert kept.exists()


def test_demo_makes_room_where_an_earlier_run_lies(tmp_path: Path) -> None:
    earlier = tmp_path / "run"
    earlier.mkdir()
    demo.remove_run(earlier)  # it was cut short before it began: nothing is in the way
    for name in ("run.json", "draft.json"):
        (earlier / name).write_text("{}")
    (earlier / "checkpoints" / "step-00000005").mkdir(parents=True)
    demo.remove_run(earlier)
    assert [*earlier.iterdir()] == []
    demo.remove_run(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_demo_ends_with_the_code_of_a_failed_command(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as end, demo.Stage(Interrupt()) as stage:
        stage.run("start", "--model", "smollm2-135m", "--set", "nonsense=1")
    assert end.value.exit_code == 2
    assert "nonsense" in capfd.readouterr().err
