"""A stranger's way from a file of conversations to an evaluated draft: each command is printed by one before it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from chats import talk, write_rows, write_target
from specd.cli.main import run
from specd.train.loop import _Run

LESS = "--limit 1 --max-new-tokens 4"


class Walker:
    """Types what is printed, and nothing else."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.offered: list[str] = []

    def type(self, command: str, code: int = 0) -> str:
        """Run a command as a shell would; returns what it printed, and keeps the commands in it."""
        name, *arguments = shlex.split(command, comments=True)
        assert name == "specd"
        assert run(arguments) == code, self._capsys.readouterr().err
        said = "".join(self._capsys.readouterr())
        self.offered = re.findall(r"^(?:next: |go on: |its draft:| {6}) *(specd .*)$", said, re.MULTILINE)
        return said

    def go(self, verb: str, less: str = "") -> str:
        """Type the one command with this verb that was printed last. less: flags that spare the test time."""
        (command,) = [each for each in self.offered if each.startswith(f"specd {verb} ")]
        return self.type(f"{command} {less}")


def test_every_command_is_printed_by_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPECD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    write_target(tmp_path / "my target", num_layers=12, padded=64)
    write_rows(tmp_path / "chats.jsonl", *({"messages": talk(f"Hi {i}", "Ho")} for i in range(24)))
    walker = Walker(capsys)
    walker.type("specd data regenerate chats.jsonl --model './my target' --output answers.jsonl --max-new-tokens 8")
    (train,) = [each for each in walker.offered if each.startswith("specd train ")]
    walker.go("data show")

    def ends(run: _Run, *rest: Any) -> None:
        if run.position.step == 1:
            raise KeyboardInterrupt
        taken(run, *rest)

    taken = _Run.step
    with monkeypatch.context() as patched:
        patched.setattr(_Run, "step", ends)
        said = walker.type(f"{train} --max-steps 3", 130)
    assert "specd: interrupted; 1 steps are kept" in said
    assert walker.offered == ["specd resume runs/first", "specd export runs/first"]
    walker.go("resume")
    after = walker.offered
    walker.go("export")
    assert (tmp_path / "drafts" / "first" / "model.safetensors").is_file()
    assert "identical" in walker.go("eval", LESS)
    walker.offered = after
    assert "identical" in walker.go("eval", LESS)
    said = walker.go("report")
    page = Path(said.split("report written to ")[1].strip()).read_text()
    assert "acceptance length" in page
