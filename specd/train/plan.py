"""The plan of a run's steps: how many there are, how many are done, and what a resumed run changes of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import NamedTuple, Protocol

from msgspec.structs import replace

from specd import units
from specd.config.settings import TrainConfig
from specd.data.batching import Loader, Place
from specd.errors import CheckpointError
from specd.train.checkpoint import PLAN, Checkpoints
from specd.train.limit import TimeLimit
from specd.train.optimizer import learning_rate, total_steps

logger = logging.getLogger(__name__)


class Counted(Protocol):
    """Batches that can be counted."""

    @property
    def num_batches(self) -> int: ...

    def before(self, epoch: int, index: int) -> int: ...


class Plan(NamedTuple):
    """steps: of the whole run. done, trained: steps and batches that a resumed run has behind it.

    change: what it changed, for people.
    """

    steps: int
    done: int = 0
    trained: int = 0
    change: str = ""


def longest(batches: Loader, held: Sequence[Place], plan: Plan, accumulation: int) -> int:
    """Tokens of the largest batch that a run is about to train: in the epoch that it is in, and held out of it."""
    epoch, index = 0, plan.trained
    while epoch < batches.epochs and index >= (size := batches.plan.num_batches(epoch)):
        epoch, index = epoch + 1, index - size
    coming = batches.places_of(epoch, index) if epoch < batches.epochs else ()
    trained = islice(coming, (plan.steps - plan.done) * accumulation)
    return max((place.tokens for place in chain(trained, held)), default=0)


def planned(
    checkpoints: Checkpoints | None, batches: Counted, config: TrainConfig, spent_s: Callable[[int], float]
) -> Plan:
    """The plan of a run. checkpoints: of one that goes on, None for a new one. batches: of all epochs.

    `train.epochs`, `train.max_steps` and `train.max_minutes` of a run that goes on may differ from before: its learning
    rate then follows the new plan, and a line says so. spent_s: seconds that the first so many steps of a run took.
    Raises CheckpointError for fewer steps or less time than are done, and what `Checkpoints.compare` raises.
    """
    if checkpoints is None:
        return Plan(total_steps(config, batches.num_batches))
    path = checkpoints.latest()
    state = checkpoints.compare(path)
    step = state.position.step
    trained = batches.before(state.position.epoch, state.position.index)
    steps = total_steps(config, batches.num_batches, step, trained)
    before = {"train.max_minutes": 0.0} | state.identity.settings
    now = checkpoints.identity.settings
    changed = [
        f"{key} was {before[key]}, is {now[key]}" for key in sorted(PLAN & before.keys()) if before[key] != now[key]
    ]
    limit = TimeLimit(config.max_minutes, spent_s(step) if changed else 0.0)
    if steps < step or trained > batches.num_batches or limit.over:
        took = f" in {units.duration(limit.spent_s)}" if limit.over else ""
        raise CheckpointError(
            f"cannot resume {path}: {'; '.join(changed)}, and {step} steps are done{took}: expected at least as many; "
            f"`specd export` gives the draft as it is"
        )
    if not changed:
        return Plan(steps, step, trained)
    old = replace(
        config,
        epochs=before["train.epochs"],
        max_steps=before["train.max_steps"],
        max_minutes=before["train.max_minutes"],
    )
    had = total_steps(old, batches.before(old.epochs, 0))
    was = TimeLimit(old.max_minutes, limit.spent_s)
    rates = [learning_rate(config, one.stands_at(step, end), end) for one, end in ((limit, steps), (was, had))]
    logger.warning(
        "%s: %s; the learning rate follows the new plan, at step %d it is %.3g in place of %.3g, so the run is no "
        "longer the one that it would have been",
        "; ".join(changed), f"{steps} steps in place of {had}" if steps != had else f"at most {steps} steps",
        step + 1, *rates,
    )  # fmt: skip
    return Plan(steps, step, trained, f"at step {step}: {'; '.join(changed)}")
