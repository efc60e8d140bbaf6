"""`specd resume RUN`: one word goes on with a run, the very same one, or one of another length that says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chats import talk, write_rows, write_target
from runs import curve
from specd.cli import resume
from specd.cli.main import run
from specd.cli.training import Job
from specd.config.settings import RunConfig
from specd.train.directory import RunFacts, write_facts
from specd.train.export import find
from specd.train.journal import read
from specd.train.loop import _Run

SMALL = ("num_layers=1", "num_taps=2", "block_size=4", "num_anchors=4", "mask_token_id=9")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a target and data, which are named by relative paths."""
    monkeypatch.setenv("SPECD_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "my place"
    write_target(place / "target", num_layers=6)
    write_rows(place / "rows.jsonl", *({"messages": talk("Hi", f"Hello {i}. " * 9)} for i in range(12)))
    monkeypatch.chdir(place)
    return place


def begin(output: str, *arguments: str) -> int:
    settings = (*(f"draft.{one}" for one in SMALL), "data.max_length=64", "data.batch_tokens=64", "train.threads=1")
    command = ["train", "dflash", "--model", "./target", "--data", "rows.jsonl", "--device", "cpu", "--exact"]
    return run(["-q", *command, "--output", output, *arguments, *(f"--set={one}" for one in settings)])


def interrupted(output: str, monkeypatch: pytest.MonkeyPatch, step: int, *arguments: str) -> None:
    """A run of which the process is told to end behind a step."""

    def ends(run: _Run, *rest: Any) -> None:
        if run.position.step == step:
            raise KeyboardInterrupt
        taken(run, *rest)

    taken = _Run.step
    with monkeypatch.context() as patched:
        patched.setattr(_Run, "step", ends)
        assert begin(output, *arguments) == 130


def test_one_word_goes_on_from_anywhere_to_the_same_bits(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert begin("whole", "--max-steps", "6") == 0
    said = capsys.readouterr().out
    assert "next:  specd eval whole --untrained\n       specd report whole\n" in said
    interrupted("runs/cut", monkeypatch, 3, "--max-steps", "6")
    said = capsys.readouterr().err
    assert "specd: interrupted; 3 steps are kept\n" in said
    assert "go on:     specd resume runs/cut\nits draft: specd export runs/cut\n" in said
    monkeypatch.chdir(tmp_path)
    assert run(["-q", "resume", "my place/runs/cut"]) == 0, capsys.readouterr().err
    assert "'my place/runs/cut' finished: 6 steps trained" in capsys.readouterr().out
    assert Path.cwd() == tmp_path
    assert curve(place / "runs" / "cut") == curve(place / "whole")
    one, other = (directory / "draft" / "model.safetensors" for directory in (place / "runs" / "cut", place / "whole"))
    assert one.read_bytes() == other.read_bytes()
    assert run(["-q", "resume", "my place/runs/cut"]) == 0, "once more, and there is nothing to do"
    assert "is finished" in capsys.readouterr().out


def test_the_draft_of_an_interrupted_run_is_exported_and_evaluated_by_what_is_printed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted("cut", monkeypatch, 3, "--max-steps", "6")
    capsys.readouterr()
    few = ["--limit", "1", "--max-new-tokens", "4", "--device", "cpu", "--dtype", "float32", "--data", "rows.jsonl"]
    assert run(["-q", "eval", "cut", *few]) == 0, capsys.readouterr().err
    assert "next:  specd export cut/checkpoints/step-00000003\n" in capsys.readouterr().out
    assert run(["-q", "export", "cut"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("draft of step 3 of 6 in cut/draft-00000003\nnext:  specd eval cut/draft-00000003\n")
    assert "| acceptance length | **1." in (place / "cut" / "draft-00000003" / "README.md").read_text()
    assert run(["-q", "eval", "cut/draft-00000003", "--untrained", *few]) == 0, "it knows its target"
    assert run(["-q", "export", "cut"]) == 2
    assert "'cut/draft-00000003' exists: choose another --to" in capsys.readouterr().err
    assert run(["-q", "export", "cut/checkpoints/step-00000003", "--to", "else/where"]) == 0
    assert find(Path("else/where")).directory == Path("else/where")


def test_more_and_fewer_steps_are_a_new_plan_and_said(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert begin("run", "--max-steps", "3") == 0
    assert run(["-q", "resume", "run", "--max-steps", "5"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().err
    assert (
        "train.max_steps was 3, is 5: 5 steps in place of 3; the learning rate follows the new plan, at step 4" in said
    )
    assert len(read(place / "run" / "metrics.jsonl")) == 5
    facts = json.loads((place / "run" / "run.json").read_bytes())
    assert facts["changes"] == ["at step 3: train.max_steps was 3, is 5"]
    assert facts["config"]["train"]["max_steps"] == 5
    assert facts["finished"]
    first, last = find(place / "run" / "draft-00000003").facts, find(place / "run").facts
    assert first is not None
    assert last is not None
    assert ((first.step, first.steps), (last.step, last.steps)) == ((3, 3), (5, 5))
    assert run(["-q", "resume", "run", "--max-steps", "2"]) == 1
    assert "train.max_steps was 5, is 2, and 5 steps are done: expected at least as many" in capsys.readouterr().err
    assert run(["-q", "resume", "run", "--max-minutes", "1e-6"]) == 1
    said = capsys.readouterr().err
    assert "train.max_minutes was 0.0, is 1e-06, and 5 steps are done in " in said
    assert run(["-q", "resume", "run", "--set", "train.lr=1"]) == 1
    assert "train.lr was 0.0006, is 1" in capsys.readouterr().err
    assert run(["-q", "resume", "elsewhere"]) == 2
    assert "'elsewhere' holds no run: expected the --output of a `specd train`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("began", "arguments", "model", "endpoints"),
    [
        ({"target": {"model": "a", "exact": True}}, [], "a", ("auto",)),
        ({"target": {"model": "a", "exact": True}}, ["--endpoint", "ipc:///d"], "", ("ipc:///d",)),
        ({"target": {"model": "a", "exact": True}}, ["--model", "b"], "b", ("auto",)),
        ({"subscriber": {"endpoints": ["tcp://d:1"], "transport": "bytes"}}, [], "", ("tcp://d:1",)),
        ({"subscriber": {"endpoints": ["tcp://d:1"], "transport": "bytes"}}, ["--model", "a"], "a", ("auto",)),
        ({"method": None, "target": {"model": "a"}}, [], "a", ("auto",)),
    ],
)
def test_its_target_may_be_elsewhere_by_now(
    began: dict[str, Any],
    arguments: list[str],
    model: str,
    endpoints: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {"method": "dflash", "train": {"lr": 0.5}} | began
    if old := config["method"] is None:  # as specd 0.1.0 wrote it
        del config["method"]
    facts = RunFacts(started="", target={}, draft={}, data={}, transports={}, machine={}, config=config)
    write_facts(tmp_path, facts)
    seen: list[tuple[RunConfig, str]] = []

    def go(ask: Callable[[], Job]) -> None:
        seen.append((ask().settle("x"), ask().model))

    monkeypatch.setattr(resume, "go", go)
    assert run(["-q", "resume", str(tmp_path), "--set", "train.keep=5", *arguments]) == 0
    ((settled, hosted),) = seen
    assert (hosted, settled.subscriber.endpoints, settled.target.get("model", "")) == (model, endpoints, model)
    assert (settled.train.lr, settled.train.keep, settled.output) == (0.5, 5, str(tmp_path))
    assert settled.target.get("exact", False) == bool(model and began.get("target", {}).get("exact"))
    assert settled.draft.get("loss") == ("decay" if old else None)


def test_one_target_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_facts(tmp_path, RunFacts(started="", target={}, draft={}, data={}, transports={}, machine={}, config={}))
    assert run(["-q", "resume", str(tmp_path), "--model", "a", "--endpoint", "ipc:///d"]) == 2
    assert "--model a hosts the target here, --endpoint ipc:///d uses a daemon: give one" in capsys.readouterr().err
