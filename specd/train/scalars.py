"""The numbers of a step under the names that loggers show them by."""

from __future__ import annotations

from collections.abc import Iterator

from specd.train.journal import StepRecord
from specd.train.measurement import Measurement


def scalars(record: StepRecord) -> dict[str, float]:
    """Every number of a step that is known, by a name of the form section/what."""
    values: dict[str, float | None] = {
        "train/loss": record.loss,
        "train/teacher_forced_accuracy": record.teacher_forced_accuracy,
        "train/lr": record.lr,
        "train/grad_norm": record.grad_norm,
        "train/epoch": float(record.epoch),
        "speed/tokens_per_s": record.tokens / record.step_s if record.step_s else None,
        "time/step_s": record.step_s,
        "time/target_wait_s": record.target_wait_s,
        "time/wire_wait_s": record.wire_wait_s,
        "time/train_s": record.train_s,
        "ring/busy_slots": float(record.busy_slots),
    }
    values |= _by_offset("", record)
    return {name: value for name, value in values.items() if value is not None}


def held_out_scalars(found: Measurement) -> dict[str, float]:
    """The same of what held-out rows show."""
    values: dict[str, float | None] = {
        "validation/loss": found.loss,
        "validation/best_loss": found.best_loss,
        "validation/teacher_forced_accuracy": found.teacher_forced_accuracy,
        "validation/seconds": found.seconds,
    }
    values |= _by_offset("validation_", found)
    return {name: value for name, value in values.items() if value is not None}


def _by_offset(begin: str, record: StepRecord | Measurement) -> Iterator[tuple[str, float | None]]:
    means = {"teacher_forced": record.teacher_forced_by_offset, **record.by_offset}
    for name, values in means.items():
        for offset, value in enumerate(values, start=1):
            yield f"{begin}{name}_by_offset/{offset:02d}", value
