"""The numbers of a step under the names that loggers show them by."""

from __future__ import annotations

from specd.train.journal import StepRecord


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
    for offset, value in enumerate(record.teacher_forced_by_offset, start=1):
        values[f"teacher_forced_by_offset/{offset:02d}"] = value
    for name, means in record.by_offset.items():
        values |= {f"{name}_by_offset/{offset:02d}": mean for offset, mean in enumerate(means, start=1)}
    return {name: value for name, value in values.items() if value is not None}
