"""The journal of a run: one line of JSON per optimizer step, each step exactly once across crashes and resumes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from specd.errors import CheckpointError, writing
from specd.train.measurement import Measurement

logger = logging.getLogger(__name__)

Bound = Literal["target", "wire", "trainer"]


class TrainedBatch(msgspec.Struct, frozen=True, kw_only=True):
    """One batch that went into an optimizer step: its place in the data plan and the ids of its samples."""

    epoch: int
    index: int
    samples: tuple[int, ...]

    def __str__(self) -> str:
        return f"batch {self.index} of epoch {self.epoch} (samples {', '.join(map(str, self.samples))})"


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What one optimizer step did and where its time went.

    step: optimizer steps done, this one included. loss: weighted mean over the step; None when the whole step had no
    weight. teacher_forced_accuracy: share of predictions that are right, given true tokens; it is not the acceptance
    length. teacher_forced_by_offset: the same for each offset 1, 2, …; None where nothing counted. by_offset: what else
    a draft measures there, as means over its predictions (cross_entropy; of dflash2 unary_correct, covered; of dspark
    accepted, confidence_error).
    grad_norm: before clipping. tokens: of the target. step_s = target_wait_s (next batch not computed yet) +
    wire_wait_s (computed, not fetched yet) + train_s (the rest). draft_s: the step's own time on its device, also the
    part during those waits; wall time on a CPU; 0 if not measured. forward_s: the daemons' forward time of its batches,
    overlapped or not. resubmitted, reconnects: in this step. shared: batches whose forward was another run's.
    replayed: those that needed none, as their daemon had kept their states.
    Of several ranks, waits are means, and forward_s, resubmitted, reconnects, shared and replayed sums over all of
    them; ranks: how many. slowest: what the slowest one needs over their mean, 0.1 for 10 % more, without its waits for
    the others.
    """

    step: int
    epoch: int
    batches: tuple[TrainedBatch, ...]
    loss: float | None
    teacher_forced_accuracy: float | None
    teacher_forced_by_offset: tuple[float | None, ...]
    lr: float
    grad_norm: float | None
    weight: float
    tokens: int
    step_s: float
    target_wait_s: float
    wire_wait_s: float
    train_s: float
    forward_s: float
    busy_slots: int
    num_slots: int
    draft_s: float = 0.0
    by_offset: dict[str, tuple[float | None, ...]] = {}
    resubmitted: int = 0
    reconnects: int = 0
    shared: int = 0
    replayed: int = 0
    ranks: int = 1
    slowest: float = 0.0

    @property
    def bound(self) -> Bound:
        """What the step spent most of its time on."""
        return bound(self.target_wait_s, self.wire_wait_s, self.train_s)


class Sink(Protocol):
    """Something that shows or stores the progress of a run."""

    def step(self, record: StepRecord) -> None:
        """Take the record of one more optimizer step."""
        ...

    def validated(self, found: Measurement) -> None:
        """Take what held-out rows show after the last step that was taken."""
        ...


def bound(target_s: float, wire_s: float, train_s: float) -> Bound:
    """Which of the three shares of a time span is the largest; the trainer wins ties."""
    if train_s >= target_s and train_s >= wire_s:
        return "trainer"
    return "target" if target_s >= wire_s else "wire"


def tell_unless_trained(steps: Sequence[StepRecord], target: str) -> None:
    """Warn of a run whose steps all had nothing to learn: its draft is as it began."""
    if steps and all(step.loss is None for step in steps):
        logger.warning(
            "none of the %d steps had a prediction to learn from, so the draft is as it began: the labels are too few, "
            "or the tokens that %s itself would write there are none of the draft's vocabulary; train on its own "
            "answers (`specd data regenerate`), or with a larger draft vocabulary",
            len(steps), target,
        )  # fmt: skip


class Journal:
    """Appends StepRecords to a file. Opened at a step, it first drops the lines of all later steps.

    path: metrics.jsonl of the run. step: the step the run continues from, 0 for a new run. All methods raise
    CheckpointError where the file cannot be written.
    """

    __slots__ = ("_end", "_file", "_last", "path")

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        self._last = self._end = 0
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a failed write must not be retried when the file is closed.
            self._file = FileIO(path, "a")
        try:
            for record, end in _records(path):
                if record.step > step:
                    break
                self._last, self._end = record.step, end
        except CheckpointError:
            self._file.close()
            raise
        if self._last < step:
            self._file.close()
            raise CheckpointError(
                f"{path} ends at step {self._last}, the checkpoint is at step {step}: restore the file, "
                f"or start a new run in another --output"
            )
        with writing(path):
            self._file.truncate(self._end)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Journal({str(self.path)!r}, step={self._last})"

    def append(self, record: StepRecord) -> None:
        """Append one line, whole or not at all. Steps must come in order, without a gap."""
        assert record.step == self._last + 1, f"journal is at step {self._last}, got {record.step}"
        line = msgspec.json.encode(record) + b"\n"
        with writing(self.path):
            try:
                written = 0
                while written < len(line):
                    written += self._file.write(line[written:])
            except OSError:
                with suppress(OSError):
                    self._file.truncate(self._end)
                raise
        self._last, self._end = record.step, self._end + len(line)

    def sync(self) -> None:
        """fsync the file: a checkpoint must never know of a step the journal can lose."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Idempotent."""
        with writing(self.path):
            self._file.close()


def read(path: Path) -> list[StepRecord]:
    """All complete records, in order; a torn end is left out, as a crash leaves it.

    Raises CheckpointError for a file that cannot be read, and for one that is no run's: a step is missing, is there
    twice, or cannot be read though a later one can.
    """
    return [record for record, _ in _records(path)]


def _records(path: Path) -> Iterator[tuple[StepRecord, int]]:
    """Each complete record with the file offset where its line ends, up to a torn end. Raises as `read`."""
    decoder = msgspec.json.Decoder(StepRecord)
    last = end = 0
    torn: Exception | None = None
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    record = decoder.decode(line)
                except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
                    torn = torn or error
                    continue
                if torn is not None or record.step != last + 1:
                    why = f"expected step {last + 1}" if torn is None else f"behind lines that cannot be read: {torn}"
                    raise CheckpointError(
                        f"{path}: line {number} is step {record.step}, {why}; it is damaged, or two processes wrote "
                        f"it: restore it, or start a new run in another --output"
                    )
                last, end = record.step, end + len(line)
                yield record, end
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; give the directory of a run") from None
    if torn is not None:
        logger.warning("%s: ignoring everything from byte %d on: %s", path, end, torn)
