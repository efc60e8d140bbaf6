"""A run's progress as Prometheus metrics: a sink of the loop that a page of metrics reads from another thread."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from specd.train.journal import StepRecord
from specd.train.measurement import Measurement

PARTS = ("target_wait", "wire_wait", "train")


class Exposition:
    """The last step of a run, and sums over this process's steps. labels: what the run is, as texts.

    steps: the last step of the plan.
    """

    def __init__(self, steps: int, labels: dict[str, str]) -> None:
        self._planned, self._labels = steps, labels
        self._state: tuple[StepRecord | None, dict[str, float]] = (None, {})
        self._found: Measurement | None = None

    def step(self, record: StepRecord) -> None:
        """Take one more step."""
        sums = dict(self._state[1])
        for name, amount in _amounts(record):
            sums[name] = sums.get(name, 0) + amount
        self._state = (record, sums)  # at once: another thread reads it

    def validated(self, found: Measurement) -> None:
        """Take what held-out rows show."""
        self._found = found

    def metrics(self) -> Iterator[Metric]:
        """All metrics of the run, as of the last step that was logged."""
        last, sums = self._state
        info = GaugeMetricFamily("specd_train_info", "The run.", labels=list(self._labels))
        info.add_metric(list(self._labels.values()), 1.0)
        yield info
        yield GaugeMetricFamily("specd_train_planned_steps", "The last step of the run.", value=self._planned)
        for name, text in (
            ("specd_train_steps", "Optimizer steps of this process."),
            ("specd_train_tokens", "Tokens of the target that were trained on."),
            ("specd_train_resubmitted_batches", "Batches that had to be asked for again."),
            ("specd_train_reconnects", "Sessions opened after the first."),
            ("specd_train_shared_batches", "Batches whose forward was another run's."),
            ("specd_train_replayed_batches", "Batches without a forward, whose states their daemon had kept."),
        ):
            yield CounterMetricFamily(name, text, value=sums.get(name, 0))
        seconds = CounterMetricFamily(
            "specd_train_seconds",
            "Time of the run, by what it went to: target_wait (not computed yet), wire_wait (not here yet), train.",
            labels=["part"],
        )
        for part in PARTS:
            seconds.add_metric([part], sums.get(part, 0))
        yield seconds
        if last is not None:
            yield from _latest(last)
        if self._found is not None:
            yield from _held_out(self._found)


def _amounts(record: StepRecord) -> Iterator[tuple[str, float]]:
    yield "specd_train_steps", 1
    yield "specd_train_tokens", record.tokens
    yield "specd_train_resubmitted_batches", record.resubmitted
    yield "specd_train_reconnects", record.reconnects
    yield "specd_train_shared_batches", record.shared
    yield "specd_train_replayed_batches", record.replayed
    for part in PARTS:
        yield part, getattr(record, f"{part}_s")


def _latest(record: StepRecord) -> Iterator[Metric]:
    """Gauges of the last step; one without a loss has none."""
    for name, text, value in (
        ("specd_train_step", "The last optimizer step.", record.step),
        ("specd_train_epoch", "Its epoch, from 0.", record.epoch),
        ("specd_train_loss", "Its loss, a weighted mean.", record.loss),
        ("specd_train_teacher_forced_accuracy", "Share of its predictions that are right, given true tokens.",
         record.teacher_forced_accuracy),
        ("specd_train_learning_rate", "Its learning rate.", record.lr),
        ("specd_train_gradient_norm", "Its gradient norm before clipping.", record.grad_norm),
        ("specd_train_step_seconds", "Its wall time.", record.step_s),
    ):  # fmt: skip
        if value is not None:
            yield GaugeMetricFamily(name, text, value=value)


def _held_out(found: Measurement) -> Iterator[Metric]:
    for name, text, value in (
        ("specd_train_validation_step", "The step after which held-out rows were last measured.", found.step),
        ("specd_train_validation_loss", "Their loss, a weighted mean.", found.loss),
        ("specd_train_validation_teacher_forced_accuracy", "Share of their predictions that are right, given true "
         "tokens.", found.teacher_forced_accuracy),
        ("specd_train_validation_acceptance_length", "Their acceptance length by real decoding.",
         found.acceptance_length),
        ("specd_train_validation_best_loss", "Their lowest loss until now.", found.best_loss),
        ("specd_train_validation_best_step", "The step that had it.", found.best_step),
        ("specd_train_validation_seconds", "Time that training waited for it.", found.seconds),
    ):  # fmt: skip
        if value is not None:
            yield GaugeMetricFamily(name, text, value=value)
