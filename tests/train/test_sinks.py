"""Where progress goes: what is refused before a run begins, and trackers that fail without a run that does."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from exposed import samples
from specd.config.settings import LogConfig, RunConfig
from specd.errors import ConfigError
from specd.train import sinks
from specd.train.directory import RunDirectory
from specd.train.sinks import Behind, check, opened
from step_records import make_run, measurement, record


class Notes:
    """A tracker that remembers, waits for `gate`, and fails at some steps."""

    def __init__(self, fails: tuple[int, ...] = (), gate: threading.Event | None = None) -> None:
        self.steps: list[int] = []
        self.finished: bool | None = None
        self._fails, self._gate = fails, gate

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._gate is not None:
            assert self._gate.wait(20)
        if step in self._fails:
            raise ConnectionError("no route to host\nand more")
        assert scalars["train/loss"] == 8.0 / step
        self.steps.append(step)

    def close(self, finished: bool) -> None:
        self.finished = finished


def test_a_tracker_has_all_steps_when_the_run_ends() -> None:
    notes = Notes()
    with Behind("notes", notes) as sink:
        for step in range(1, 30):
            sink.step(record(step))
    assert notes.steps == list(range(1, 30))
    assert notes.finished


def test_a_tracker_is_told_what_held_out_rows_show() -> None:
    told: list[tuple[int, Mapping[str, float]]] = []

    class Told(Notes):
        def log(self, step: int, scalars: Mapping[str, float]) -> None:
            told.append((step, scalars))

    with Behind("told", Told()) as sink:
        sink.validated(measurement(20))
    ((step, scalars),) = told
    assert step == 20
    assert scalars == {
        "validation/loss": 2.75, "validation/best_loss": 2.5, "validation/teacher_forced_accuracy": 0.25,
        "validation/seconds": 1.0, "validation_teacher_forced_by_offset/01": 0.5,
        "validation_cross_entropy_by_offset/01": 2.0,
    }  # fmt: skip


def test_an_interrupted_run_is_not_called_finished() -> None:
    notes = Notes()
    with pytest.raises(KeyboardInterrupt), Behind("notes", notes):
        raise KeyboardInterrupt
    assert notes.finished is False


def test_a_tracker_that_fails_is_a_warning_and_no_end(caplog: pytest.LogCaptureFixture) -> None:
    notes = Notes(fails=(2, 3))
    with caplog.at_level(logging.WARNING), Behind("notes", notes) as sink:
        for step in range(1, 6):
            sink.step(record(step))
    assert notes.steps == [1, 4, 5]
    assert [each.getMessage() for each in caplog.records] == [
        "notes did not take a step (no route to host); training goes on, and the journal has it",
        "notes lacks 2 steps; the journal has them",
    ]


def test_a_tracker_that_hangs_holds_up_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sinks, "BEHIND", 3)
    gate = threading.Event()
    notes = Notes(gate=gate)
    with caplog.at_level(logging.WARNING), Behind("notes", notes) as sink:
        for step in range(1, 10):
            sink.step(record(step))
        gate.set()
    assert 3 <= len(notes.steps) <= 4
    assert f"lacks {9 - len(notes.steps)} steps" in caplog.text


def test_loggers_that_are_unknown_or_missing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"log.to='wandbd': expected any of tensorboard, wandb, mlflow, trackio"):
        check(LogConfig(to=("wandbd",)))
    with pytest.raises(ConfigError, match="expected PORT"):
        check(LogConfig(metrics="here"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(ConfigError, match=r"cannot listen there: .*in use"):
            check(LogConfig(metrics=port))
        check(LogConfig(metrics=port), serves=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"package 'mlflow' is not installed; install it with: .*mlflow\]"):
        check(LogConfig(to=("mlflow",)))


def test_a_tracker_that_takes_no_run_is_an_error_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**settings: object) -> None:
        raise ValueError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    run = RunConfig(method="dflash", log=LogConfig(to=("wandb",)))
    with (
        pytest.raises(ConfigError, match=r"log.to='wandb': it takes no run \(ValueError: api_key not configured"),
        opened(run, RunDirectory(make_run(tmp_path / "run")), "tiny", 0, 5),
    ):
        pytest.fail("it was opened")


def test_a_run_is_known_again_by_its_directory_and_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, object]] = []
    nothing = SimpleNamespace(log=lambda *_, **__: None, finish=lambda **_: None)

    def init(**facts: object) -> object:
        seen.append(facts)
        return nothing

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for place in ("a", "a", "b"):
        directory = RunDirectory(tmp_path / place)
        if not directory.begun:
            make_run(directory.path, steps=2)
        with opened(RunConfig(method="dflash", log=LogConfig(to=("wandb",))), directory, "tiny", 0, 5):
            pass
    assert [facts["name"] for facts in seen] == ["a", "a", "b"]
    first, again, other = (facts["id"] for facts in seen)
    assert first == again != other


def test_a_page_and_tensorboard_see_the_same_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunConfig(method="dflash", log=LogConfig(to=("tensorboard",), metrics="0"))
    directory = RunDirectory(make_run(tmp_path / "run", steps=2))
    with caplog.at_level(logging.INFO, "specd.scrape"), opened(run, directory, "tiny", 0, 5) as found:
        for sink in found:
            sink.step(record(1))
        (url,) = [each.getMessage().removeprefix("metrics at ") for each in caplog.records]
        with urllib.request.urlopen(url, timeout=20) as answer:
            page = samples(answer.read().decode())
    assert page["specd_train_step"] == 1
    assert page["specd_train_planned_steps"] == 5
    assert len(list(directory.tensorboard.iterdir())) == 1


def test_nothing_is_opened_unasked(tmp_path: Path) -> None:
    with opened(RunConfig(method="dflash"), RunDirectory(tmp_path), "tiny", 0, 5) as found:
        assert found == []
    assert not list(tmp_path.iterdir())
