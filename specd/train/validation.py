"""What held-out rows show as a run goes on: when they are measured, which step was best, and whether it should end.

Their batches come through the same stream as those of training, between two steps, and are computed by the same code
without a backward pass. Weights, moments and random generators stay as they are: training does not depend on it.
`validation.jsonl` has one line for each measurement. It alone says what was best: a resumed run reads it again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from specd.config.settings import RunConfig, ValidationConfig
from specd.data.batching import BatchPlan, Place
from specd.data.dataset import Dataset
from specd.drafts.base import Objective
from specd.errors import BatchError, ConfigError
from specd.train.checkpoint import RngStates
from specd.train.distributed import Ranks
from specd.train.measurement import Measurement, append, read, write
from specd.train.step import Window

if TYPE_CHECKING:
    from specd.protocol.batch import Delivery

logger = logging.getLogger(__name__)

SHARE = 0.02
"""Part of the rows that is held out where nothing else is said, and how many tokens more a run may take to measure."""
FEWEST_ROWS = 25
"""Fewer say too little of a draft to hold them out unasked."""


class Shown(Protocol):
    """What decoding shows."""

    @property
    def acceptance_length(self) -> float: ...

    @property
    def acceptance_by_offset(self) -> tuple[float, ...]: ...


class Decoder(Protocol):
    """What decodes held-out prompts with a draft as it is."""

    def measure(self, objective: Objective) -> Shown: ...


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What is held out of training. samples: bool, of each sample; rows: how many rows they are of."""

    samples: NDArray[np.bool_]
    rows: int

    @property
    def count(self) -> int:
        """How many samples."""
        return int(self.samples.sum())


def held_out(config: ValidationConfig, dataset: Dataset, seed: int) -> tuple[ValidationConfig, Held]:
    """The rows that a run holds out, and its settings with a share that is a number.

    Raises ConfigError for a share that was asked for and is less than one row.
    """
    asked = config.share != "auto" or config.decode_every > 0
    share = config.share if isinstance(config.share, float | int) else SHARE
    samples = dataset.held_out(share, config.rows, seed)
    rows = int(np.unique(dataset.rows[samples]).size)
    if rows < FEWEST_ROWS and not asked:
        return replace(config, share=0.0), Held(samples=np.zeros_like(samples), rows=0)
    if not share and config.decode_every:
        raise ConfigError(
            f"validation.decode_every={config.decode_every}: no rows are held out to take prompts from; set "
            f"validation.share in a new run, or leave it out"
        )
    if share and not rows:
        raise ConfigError(
            f"validation.share={share:g} of {np.unique(dataset.rows).size} rows is none: expected at least one; raise "
            f"it, or set it to 0 to hold none out"
        )
    return replace(config, share=float(share)), Held(samples=samples, rows=rows)


class Validation:
    """When held-out batches are measured, and what has come of it. All ranks have one, with the same in it.

    places: the batches, none to measure nothing. every: steps between measurements; the last step is measured, too.
    patience: measurements without a lower loss that end the run, 0 for none. path: of its journal. decode_every: steps
    between decodings, which rank 0 makes by its `decoder`; the last step is decoded, too.
    """

    __slots__ = ("decode_every", "decoder", "every", "last", "path", "patience", "places")

    def __init__(self, places: Sequence[Place], every: int, patience: int, path: Path) -> None:
        self.places, self.every, self.patience, self.path = tuple(places), every, patience, path
        self.decode_every = 0
        self.decoder: Decoder | None = None
        self.last: Measurement | None = None

    def __repr__(self) -> str:
        return f"Validation({len(self.places)} batches, every {self.every} steps, last {self.last})"

    @property
    def tokens(self) -> int:
        """Of the target, each time."""
        return sum(place.tokens for place in self.places)

    @property
    def ended(self) -> bool:
        """Whether the run should end here."""
        return bool(self.patience and self.last is not None and self.last.waited >= self.patience)

    def begin(self, step: int, ranks: Ranks) -> None:
        """Go on from `step`, 0 for a new run: rank 0 drops what was measured later, all learn what is left.

        Raises CheckpointError where the journal cannot be written.
        """
        if not self.places:
            return

        def left() -> object:
            found = read(self.path)
            kept = [one for one in found if one.step <= step]
            if self.path.exists():
                write(self.path, kept)
            return msgspec.to_builtins(kept[-1]) if kept else None

        told = ranks.decide("validation", left)
        self.last = None if told is None else msgspec.convert(told, Measurement)

    def due(self, step: int, steps: int) -> bool:
        """Whether the held-out rows are measured after `step` of `steps`, and were not yet."""
        known = self.last.step if self.last is not None else 0
        return bool(self.places) and step > known and (step % self.every == 0 or self._decodes(step, steps))

    def _decodes(self, step: int, steps: int) -> bool:
        return step == steps or bool(self.decode_every and step % self.decode_every == 0)

    def decoded(self, found: Measurement, objective: Objective, steps: int) -> Measurement:
        """`found` with what real decoding shows, where that is due and this rank decodes."""
        if self.decoder is None or not self._decodes(found.step, steps):
            return found
        shown = self.decoder.measure(objective)
        return replace(
            found, acceptance_length=shown.acceptance_length, acceptance_by_offset=shown.acceptance_by_offset
        )

    def among(self, training: Iterator[tuple[Place, ...]], step: int, steps: int) -> Iterator[Sequence[Place]]:
        """The batches of each optimizer step after `step`, and the held-out ones wherever they are due."""
        due = {number for number in range(step, steps + 1) if self.due(number, steps)}
        if step in due:
            yield self.places
        for number, places in enumerate(training, step + 1):
            yield places
            if number in due:
                yield self.places

    def why_ended(self, steps: int) -> str:
        """Why a run of `steps` steps ends early."""
        last = self.last
        assert last is not None, "measured"
        lower = f"lower than {last.best_loss:.4f} at step {last.best_step}" if last.best_loss is not None else "at all"
        return (
            f"the run ends at step {last.step} of {steps}: {last.waited} measurements in a row had no held-out loss "
            f"{lower} (validation.patience={self.patience})"
        )

    def judged(self, found: Measurement) -> Measurement:
        """`found` with what is known of the best one."""
        last = self.last
        lowest = last.best_loss if last is not None else None
        best = found.loss is not None and (lowest is None or found.loss < lowest)
        if best:
            return replace(found, best=True, best_loss=found.loss, best_step=found.step, waited=0)
        if last is None:
            return replace(found, waited=1)
        return replace(found, best_loss=lowest, best_step=last.best_step, waited=last.waited + 1)

    def keep(self, found: Measurement, *, noted: bool) -> None:
        """Take a judged measurement, and write it where it is to be `noted`; its checkpoint is marked before that."""
        self.last = found
        if noted:
            append(self.path, found)


def looked_at(
    window: Window, objective: Objective, deliveries: Iterator[Delivery], mine: Sequence[Place], step: int
) -> None:
    """Put the losses of this rank's held-out batches, which come next, into `window`.

    They are computed as in training, graph and all: without one, everything compiled would be compiled once more.
    """
    rng = RngStates.capture()
    for number, _ in enumerate(mine):
        if (delivery := next(deliveries, None)) is None:
            raise BatchError(f"the stream ended {len(mine) - number} held-out batches early, after step {step}")
        window.look(objective.loss(delivery))
    rng.restore()


def places_of(run: RunConfig, dataset: Dataset, held: Held) -> list[Place]:
    """The batches of what is held out."""
    return list(dataset.plan_of(held.samples, run.data, run.train.seed).places(0)) if held.rows else []


def planned(run: RunConfig, dataset: Dataset, held: Held, plan: BatchPlan, path: Path) -> Validation:
    """The measurements of a run. run: with a share that is settled. plan: what it trains."""
    settings = run.validation
    if not held.rows:
        return Validation((), 0, 0, path)
    places = places_of(run, dataset, held)
    tokens = sum(place.tokens for place in places)
    epoch = [place.tokens for place in plan.places(0)] or [run.data.batch_tokens]
    a_step = run.train.accumulation * sum(epoch) / len(epoch)
    every = settings.every or max(1, math.ceil(tokens / (SHARE * a_step)))
    logger.info(
        "%d rows are held out of training (%d tokens): measured every %d steps and at the end", held.rows, tokens, every
    )
    found = Validation(places, every, settings.patience, path)
    found.decode_every = settings.decode_every
    return found
