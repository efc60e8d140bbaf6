"""Weights & Biases, MLflow and trackio: each as one run, which a resumed training goes on with.

What they raise is theirs to choose; `sinks` keeps it from the training.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

MOST_PARAMS = 100
"""Parameters that MLflow takes at a time."""
RUN_TAG = "specd.run"
LOSSES = ("train/loss", "validation/loss")


class Tracked(NamedTuple):
    """What a tracker is told of a run. name: for people. id: the same when it is resumed. facts: settings and so on."""

    project: str
    name: str
    id: str
    directory: Path
    facts: Mapping[str, Any]


class Tracker(Protocol):
    """One run at a tracker. Not thread-safe."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take the numbers of one step."""
        ...

    def close(self, finished: bool) -> None:
        """End the run; it may be gone on with where it is not `finished`."""
        ...


class WandB:
    """Weights & Biases; offline, and as whom, is said by its own environment (WANDB_MODE, WANDB_API_KEY)."""

    def __init__(self, run: Tracked) -> None:
        import wandb

        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=str(run.directory),
            config=dict(run.facts),
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """MLflow, at the server that its own environment names (MLFLOW_TRACKING_URI)."""

    def __init__(self, run: Tracked) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = client = MlflowClient()
        experiment = client.get_experiment_by_name(run.project)
        place = experiment.experiment_id if experiment else client.create_experiment(run.project)
        found = client.search_runs([place], filter_string=f"tags.`{RUN_TAG}` = '{run.id}'", max_results=1)
        self._had: dict[tuple[str, int], float] = {}
        """What a resumed run has already, by which steps are known that are trained again after a crash."""
        if found:
            self._id = found[0].info.run_id
            client.update_run(self._id, status="RUNNING")
            for name in LOSSES:
                self._had |= {(name, point.step): point.value for point in client.get_metric_history(self._id, name)}
            return
        self._id = client.create_run(place, run_name=run.name, tags={RUN_TAG: run.id}).info.run_id
        params = [Param(name, str(value)) for name, value in flat(run.facts).items()]
        for begin in range(0, len(params), MOST_PARAMS):
            client.log_batch(self._id, params=params[begin : begin + MOST_PARAMS])

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        known = [(name, step) for name in LOSSES if name in scalars and (name, step) in self._had]
        if known and all(self._had[name, step] == scalars[name] for name, _ in known):
            return  # a step of another plan has another loss
        now = time.time_ns() // 1_000_000
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in scalars.items()])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


class Trackio:
    """trackio; where it keeps its runs is said by its own environment (TRACKIO_DIR, TRACKIO_SPACE_ID)."""

    def __init__(self, run: Tracked) -> None:
        import trackio

        # It knows a run by its name alone.
        self._run = trackio.init(
            project=run.project, name=f"{run.name}-{run.id}", config=dict(run.facts), resume="allow", embed=False
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self, finished: bool) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Tracked], Tracker]] = {"wandb": WandB, "mlflow": MLflow, "trackio": Trackio}


def flat(facts: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    """Nested facts by `a.b` names."""
    found: dict[str, Any] = {}
    for key, value in facts.items():
        found |= flat(value, f"{under}{key}.") if isinstance(value, Mapping) else {f"{under}{key}": value}
    return found
