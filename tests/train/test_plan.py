"""The plan of a run's steps: what a resumed run may change of it, and what is said of that."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from specd.config.settings import TrainConfig
from specd.data.batching import BatchPlan, Loader, Place
from specd.errors import CheckpointError
from specd.train.checkpoint import Identity, Position
from specd.train.plan import Plan, longest, planned

CONFIG = TrainConfig(epochs=2, accumulation=3)


def batches(epochs: int) -> Loader:
    """Ten a time."""
    nothing: Any = SimpleNamespace()
    return Loader(nothing, BatchPlan([4] * 10, 4, packing="fixed"), epochs=epochs)


def stopped(before: TrainConfig, now: TrainConfig, step: int = 4) -> Any:
    """Checkpoints of a run that has come to `step`, as it is resumed."""

    def identity(config: TrainConfig) -> Identity:
        names = ("epochs", "max_steps", "max_minutes")
        return Identity(target="", settings={f"train.{name}": getattr(config, name) for name in names})

    position = Position(step=step, epoch=step * 3 // 10, index=step * 3 % 10)
    state = SimpleNamespace(position=position, identity=identity(before))
    return SimpleNamespace(latest=lambda: Path("step-4"), compare=lambda path: state, identity=identity(now))


def resumed(now: TrainConfig, before: TrainConfig = CONFIG, spent_s: float = 60.0) -> Plan:
    return planned(stopped(before, now), batches(now.epochs), now, lambda step: spent_s)


def test_a_new_run_and_one_that_goes_on_as_it_was() -> None:
    assert planned(None, batches(2), CONFIG, lambda step: 0.0) == Plan(7)
    assert planned(None, batches(2), replace(CONFIG, max_steps=5), lambda step: 0.0) == Plan(5)
    assert resumed(CONFIG) == Plan(7, 4, 12)


def test_of_the_batches_of_an_epoch_those_that_come_are_looked_at() -> None:
    nothing: Any = SimpleNamespace()
    two = Loader(nothing, BatchPlan([*[4] * 10, 9], 9, 1, seed=5, packing="fixed"), epochs=2)
    first, second = ([place.tokens for place in two.places_of(epoch)].index(9) for epoch in range(2))
    assert 0 < first < second < 10
    done = first, first + 1, 11 + second, 22
    plans = Plan(22), Plan(first), *(Plan(22, count, count) for count in done)
    assert [longest(two, (), plan, 1) for plan in plans] == [9, 4, 9, 4, 9, 0]
    # A run that goes on behind its end may have had fewer batches in its last step.
    assert [longest(two, (), Plan(8, 7, trained), 1) for trained in (first, first + 1)] == [9, 4]
    assert longest(two, [Place(0, 0, (0,), 6)], Plan(first), 1) == 6


def test_another_length_is_another_plan_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert resumed(replace(CONFIG, epochs=3)) == Plan(10, 4, 12, "at step 4: train.epochs was 2, is 3")
    assert "train.epochs was 2, is 3: 10 steps in place of 7; the learning rate follows the new plan" in caplog.text
    limited = replace(CONFIG, max_minutes=2.0)
    assert resumed(limited) == Plan(7, 4, 12, "at step 4: train.max_minutes was 0.0, is 2.0")
    assert "at most 7 steps; the learning rate" in caplog.text


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (replace(CONFIG, epochs=1), r"train\.epochs was 2, is 1, and 4 steps are done: expected at least as many"),
        (replace(CONFIG, max_steps=3), r"train\.max_steps was 0, is 3, and 4 steps are done"),
        (replace(CONFIG, max_minutes=0.5), r"train\.max_minutes was 0\.0, is 0\.5, and 4 steps are done in 1 min 00 s"),
    ],
)
def test_less_than_is_done_is_refused(now: TrainConfig, said: str) -> None:
    with pytest.raises(CheckpointError, match=rf"cannot resume step-4: {said}.*`specd export` gives the draft"):
        resumed(now)
