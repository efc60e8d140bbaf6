"""Trackers: the calls that each is sent, and, where its package is installed, a run that is begun and gone on with."""

from __future__ import annotations

import json
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specd.train.trackers import RUN_TAG, TRACKERS, Tracked, flat


@pytest.fixture
def run(tmp_path: Path) -> Tracked:
    return Tracked("project", "first", "abcd1234", tmp_path, {"train": {"lr": 1e-3}, "method": "dflash"})


class Calls(list[tuple[str, tuple[Any, ...], dict[str, Any]]]):
    """Takes any call of any name, and remembers it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Calls:
            self.append((name, args, kwargs))
            return self

        return call


@pytest.mark.parametrize(("name", "ends"), [("wandb", {"exit_code": 1}), ("trackio", {})])
def test_a_run_is_named_so_that_a_resume_finds_it(
    name: str, ends: dict[str, int], run: Tracked, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls()
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=calls.init))
    tracker = TRACKERS[name](run)
    tracker.log(3, {"train/loss": 2.5})
    tracker.close(finished=False)
    (_, _, begun), logged, ended = calls
    assert begun["project"] == "project"
    assert begun["resume"] == "allow"
    assert "abcd1234" in f"{begun['name']} {begun.get('id')}"
    assert begun["config"] == run.facts
    assert logged == ("log", ({"train/loss": 2.5},), {"step": 3})
    assert ended == ("finish", (), ends)


def test_facts_are_flat_parameters() -> None:
    assert flat({"train": {"lr": 1e-3, "betas": [0.9, 0.95]}, "method": "x"}) == {
        "train.lr": 1e-3,
        "train.betas": [0.9, 0.95],
        "method": "x",
    }


def twice(name: str, run: Tracked, kept: int = 3) -> None:
    """A run of steps 1 to 3 that was killed, and went on to step 5 from its checkpoint of step `kept`."""
    for steps in ((1, 2, 3), range(kept + 1, 6)):
        tracker = TRACKERS[name](run)
        for step in steps:
            tracker.log(step, {"train/loss": 8.0 / step})
        tracker.close(finished=5 in steps)


@pytest.mark.filterwarnings("ignore")
def test_mlflow_goes_on_with_the_run_it_had(run: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{run.directory}/runs")
    twice("mlflow", run, kept=1)
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("project").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.tags[RUN_TAG] == "abcd1234"
    assert found.data.params == {"train.lr": "0.001", "method": "dflash"}
    points = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == [(step, 8.0 / step) for step in range(1, 6)], (
        "each step once"
    )
    changed = TRACKERS["mlflow"](run)
    for step, loss in ((4, 2.0), (5, 7.0)):  # as of another plan from step 5 on
        changed.log(step, {"train/loss": loss})
    points = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in points][5:] == [(5, 7.0)]


@pytest.mark.filterwarnings("ignore")
def test_trackio_goes_on_with_the_run_it_had(run: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(run.directory))  # read at its import
    pytest.importorskip("trackio", reason="trackio is not installed")
    twice("trackio", run)
    (file,) = run.directory.rglob("project.db")
    with sqlite3.connect(file) as store:
        rows = store.execute(
            "select run_name, step, metrics from metrics where cast(metrics as text) like '%loss%' order by step"
        )
        found = [(name, step, json.loads(metrics)["train/loss"]) for name, step, metrics in rows]
    assert found == [("first-abcd1234", step, 8.0 / step) for step in range(1, 6)]


@pytest.mark.filterwarnings("ignore")
def test_wandb_goes_on_with_the_run_it_had(run: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    twice("wandb", run)
    wandb.teardown()
    kept = [path.name.rpartition("-")[2] for path in (run.directory / "wandb").glob("offline-run-*")]
    assert set(kept) == {"abcd1234"}
