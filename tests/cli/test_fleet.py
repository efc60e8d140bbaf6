"""Commands side by side: the end of one is told and leaves the others alone."""

from __future__ import annotations

from pathlib import Path

from specd.cli.children import Children
from specd.cli.fleet import Command, Fleet
from specd.cli.standings import Standing
from specd.train.interrupt import Interrupt


def test_who_fails_is_told_of_with_the_error_of_this_time(tmp_path: Path) -> None:
    said: list[str] = []
    refreshed: list[None] = []
    (tmp_path / "b.log").write_text("specd: error: an older one\n")
    runs = {name: Standing(name, "dflash, cpu", tmp_path / name) for name in "abc"}
    arguments = {"a": ["--version"], "b": ["report", str(tmp_path / "none")], "c": ["keys", "none"]}
    commands = [Command(run, arguments[name], tmp_path / f"{name}.log") for name, run in runs.items()]
    with Children(Interrupt()) as children:
        fleet = Fleet(children, said.append, lambda: refreshed.append(None))
        fleet.run(commands, "training")
        assert not children.running
    assert {run.name: run.state for run in runs.values()} == {"a": "finished", "b": "failed", "c": "failed"}
    assert {run.name for run in fleet.failed} == {"b", "c"}
    assert refreshed
    assert said[0].startswith("a: dflash, cpu, training, process ")
    assert said[0].endswith(f"; log {tmp_path}/a.log")
    assert "a: finished, 0 steps" in said
    (failed,) = (line for line in said if line.startswith("b: failed"))
    assert failed.startswith(f"b: failed after step 0: cannot read {tmp_path}/none/run.json")
    assert not said[-1].endswith("; the others go on"), "it was the last one"
    assert "specd 0" in (tmp_path / "a.log").read_text()
