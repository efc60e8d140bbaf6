"""What is said at the end of a run, however it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from specd.cli.training import Job, go, then
from specd.config.settings import RunConfig
from specd.errors import SpecdError
from specd.train.checkpoint import STATE
from specd.train.directory import RunFacts, write_facts
from specd.train.trainer import TrainedRun

STATE_JSON = (
    b'{"format": 1, "position": {"step": 7}, "identity": {"target": "t", "settings": {}}, "python_rng": 0, '
    b'"numpy_rng": 0, "files": {}}'
)


def ended(output: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException | TrainedRun) -> None:
    """A run in `output` that ends so."""

    def train_draft(*_: Any, **__: Any) -> TrainedRun:
        if isinstance(end, TrainedRun):
            return end
        raise end

    monkeypatch.setattr("specd.train.trainer.train_draft", train_draft)
    first = RunConfig(method="dflash", output=str(output))
    go(lambda: Job(settle=lambda target: first, first=first, model=""))


def begin(output: Path, *, checkpoint: bool) -> None:
    output.mkdir()
    write_facts(output, RunFacts(started="", target={}, draft={}, data={}, transports={}, machine={}, config={}))
    if checkpoint:
        place = output / "checkpoints" / "step-00000007"
        place.mkdir(parents=True)
        (place / STATE).write_bytes(STATE_JSON)


@pytest.mark.parametrize(
    ("begun", "checkpoint", "said"),
    [
        (False, False, "specd: interrupted; nothing was trained yet: give the same command again\n"),
        (True, False, "specd: interrupted; 0 steps are kept\ngo on:     specd resume {}\n"),
        (
            True,
            True,
            "specd: interrupted; 7 steps are kept\ngo on:     specd resume {0}\nits draft: specd export {0}\n",
        ),
    ],
)
def test_an_interrupted_run_says_how_it_goes_on(
    begun: bool,
    checkpoint: bool,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "my run"
    if begun:
        begin(output, checkpoint=checkpoint)
    with pytest.raises(typer.Exit) as raised:
        ended(output, monkeypatch, KeyboardInterrupt())
    assert raised.value.exit_code == 130
    assert capsys.readouterr().err == said.format(f"'{output}'")


def test_a_failed_run_says_how_its_draft_is_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for checkpoint, notes in ((False, []), (True, [f"its draft so far: specd export {tmp_path}/True"])):
        begin(tmp_path / str(checkpoint), checkpoint=checkpoint)
        with pytest.raises(SpecdError) as raised:
            ended(tmp_path / str(checkpoint), monkeypatch, SpecdError("no memory"))
        assert getattr(raised.value, "__notes__", []) == notes


def test_a_finished_run_says_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    ended(run, monkeypatch, TrainedRun(run, run / "draft", 9))
    assert capsys.readouterr().out.splitlines() == [
        f"{run} finished: 9 steps trained; draft in {run}/draft",
        f"next:  specd eval {run} --untrained",
        f"       specd report {run}",
        f"       specd export {run} --to drafts/run",
    ]
    then("one")
    assert capsys.readouterr().out == "next:  one\n"
