"""What held-out rows showed after one optimizer step, and the file of all such measurements of a run."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from specd.errors import CheckpointError, writing
from specd.paths import replacing

if TYPE_CHECKING:
    from specd.train.step import Sums

logger = logging.getLogger(__name__)


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What the held-out rows show after an optimizer step.

    loss: weighted mean over all of them; None where nothing was predicted, or where it was not finite.
    teacher_forced_accuracy, teacher_forced_by_offset, by_offset: as in a StepRecord. weight: of all predictions.
    tokens: of the target. seconds: that training waited. best: the lowest loss of the run until then. best_loss,
    best_step: the lowest one, this one included. waited: measurements since then. acceptance_length,
    acceptance_by_offset: of real decoding, as in an Evaluation; None and nothing where none was made.
    """

    step: int
    loss: float | None
    teacher_forced_accuracy: float | None
    teacher_forced_by_offset: tuple[float | None, ...]
    by_offset: dict[str, tuple[float | None, ...]] = {}
    weight: float
    tokens: int
    seconds: float
    best: bool = False
    best_loss: float | None = None
    best_step: int = 0
    waited: int = 0
    acceptance_length: float | None = None
    acceptance_by_offset: tuple[float, ...] = ()


def measured(step: int, sums: Sums, names: Sequence[str], tokens: int) -> Measurement:
    """What the sums over all held-out batches say; waits for the device."""
    weight, total = float(sums.weight), float(sums.losses.sum())
    correct, counted, *others = sums.counts.tolist()
    loss = total / weight if weight else None
    if loss is not None and not math.isfinite(loss):
        logger.warning("step %d: the held-out loss is %s: it does not count", step, loss)
        loss = None
    return Measurement(
        step=step,
        loss=loss,
        teacher_forced_accuracy=sum(correct) / sum(counted) if sum(counted) else None,
        teacher_forced_by_offset=means(correct, counted),
        # A rank without a batch has no names for them, and no journal.
        by_offset={name: means(values, counted) for name, values in zip(names, others, strict=False)},
        weight=weight,
        tokens=tokens,
        seconds=0.0,
    )


def means(sums: Sequence[float], counted: Sequence[float]) -> tuple[float | None, ...]:
    """Of each offset; None where nothing counted."""
    return tuple(total / of if of else None for total, of in zip(sums, counted, strict=True))


def read(path: Path) -> list[Measurement]:
    """All measurements of a run, in order, up to a torn end; none where there is no file.

    Raises CheckpointError for a file that cannot be read.
    """
    decoder = msgspec.json.Decoder(Measurement)
    found: list[Measurement] = []
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; let it be read, or remove it to go on without what was measured"
        ) from None
    for line in lines:
        try:
            one = decoder.decode(line)
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError):
            one = None
        if one is None or not line.endswith(b"\n") or (found and one.step <= found[-1].step):
            logger.warning("%s: ignoring everything from line %d on: it is damaged", path, len(found) + 1)
            break
        found.append(one)
    return found


def write(path: Path, found: Sequence[Measurement]) -> None:
    with writing(path), replacing(path) as file:
        file.write(b"".join(msgspec.json.encode(one) + b"\n" for one in found))


def append(path: Path, one: Measurement) -> None:
    """Add a line, synced."""
    with writing(path), open(path, "ab") as file:
        file.write(msgspec.json.encode(one) + b"\n")
        file.flush()
        os.fsync(file.fileno())
