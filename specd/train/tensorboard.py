"""TensorBoard scalars of a run."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from specd.errors import missing_extra, writing
from specd.train.journal import StepRecord
from specd.train.measurement import Measurement
from specd.train.scalars import scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Scalars:
    """TensorBoard scalars of a run, in `directory`. step: where it continues; later points are purged.

    All methods raise CheckpointError where they cannot be written.
    """

    def __init__(self, directory: Path, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise missing_extra("tensorboard", "tensorboard") from None

        self.directory = directory
        with writing(directory):
            self._writer: SummaryWriter = SummaryWriter(str(directory), purge_step=step + 1)

    def step(self, record: StepRecord) -> None:
        """Write one more optimizer step."""
        self._add(record.step, scalars(record))

    def validated(self, found: Measurement) -> None:
        """Write what held-out rows show."""
        self._add(found.step, scalars(found))

    def _add(self, step: int, values: dict[str, float]) -> None:
        with writing(self.directory):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

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
