"""TensorBoard scalars of a run."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from specd.errors import writing
from specd.train.journal import StepRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Scalars:
    """TensorBoard scalars of a run, in `directory`. step: where it continues; later points are purged.

    All methods raise CheckpointError where they cannot be written.
    """

    def __init__(self, directory: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.directory = directory
        with writing(directory):
            self._writer: SummaryWriter = SummaryWriter(str(directory), purge_step=step + 1)

    def step(self, record: StepRecord) -> None:
        """Write one more optimizer step."""
        scalars: dict[str, float | None] = {
            "train/loss": record.loss,
            "train/teacher_forced_accuracy": record.teacher_forced_accuracy,
            "train/lr": record.lr,
            "train/grad_norm": record.grad_norm,
            "speed/tokens_per_s": record.tokens / record.step_s if record.step_s else None,
            "time/step_s": record.step_s,
            "time/target_wait_s": record.target_wait_s,
            "time/wire_wait_s": record.wire_wait_s,
            "time/train_s": record.train_s,
            "ring/busy_slots": float(record.busy_slots),
        }
        for offset, value in enumerate(record.teacher_forced_by_offset, start=1):
            scalars[f"teacher_forced_by_offset/{offset:02d}"] = value
        with writing(self.directory):
            for name, value in scalars.items():
                if value is not None:
                    self._writer.add_scalar(name, value, record.step)

    def close(self) -> None:
        """Write out what is buffered. Idempotent."""
        with writing(self.directory):
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
