"""The numbers of a step under the names that loggers show them by."""

from __future__ import annotations

from specd.train.journal import StepRecord
from specd.train.measurement import Measurement


def scalars(record: StepRecord | Measurement) -> dict[str, float]:
    """Every number of a step, or of held-out rows, that is known, by a name of the form section/what."""
    values = _held_out(record) if isinstance(record, Measurement) else _trained(record)
    means = {"teacher_forced": record.teacher_forced_by_offset, **record.by_offset}
    begin = "validation_" if isinstance(record, Measurement) else ""
    for name, shares in means.items():
        values |= {f"{begin}{name}_by_offset/{offset:02d}": share for offset, share in enumerate(shares, start=1)}
    return {name: value for name, value in values.items() if value is not None}


def _trained(record: StepRecord) -> dict[str, float | None]:
    return {
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


def _held_out(found: Measurement) -> dict[str, float | None]:
    return {
        "validation/loss": found.loss,
        "validation/best_loss": found.best_loss,
        "validation/teacher_forced_accuracy": found.teacher_forced_accuracy,
        "validation/acceptance_length": found.acceptance_length,
        "validation/seconds": found.seconds,
    }
