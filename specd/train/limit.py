"""How long a run may train: the clock of its own steps, which a resumed run goes on with."""

from __future__ import annotations

import math
from pathlib import Path

from specd.train.journal import StepRecord, read


class TimeLimit:
    """minutes: train.max_minutes, 0 for no limit. spent_s: seconds of all steps that are logged.

    All ranks have the clock of rank 0, as their logs have it, so they end at the same step.
    """

    __slots__ = ("minutes", "spent_s")

    def __init__(self, minutes: float, spent_s: float = 0.0) -> None:
        self.minutes, self.spent_s = minutes, spent_s

    def __repr__(self) -> str:
        return f"TimeLimit({self.spent_s:.1f} s of {self.minutes:g} minutes)"

    @property
    def over(self) -> bool:
        return self.left_s == 0

    @property
    def left_s(self) -> float:
        """Seconds until it is over."""
        return max(0.0, 60 * self.minutes - self.spent_s) if self.minutes else math.inf

    def take(self, record: StepRecord) -> None:
        """Count one more step."""
        self.spent_s += record.step_s

    def stands_at(self, step: int, steps: int) -> float:
        """How far the learning rate's schedule over `steps` steps is once `step` are done: by steps or time, if later.

        So the rate has come down when the time is over, too.
        """
        return max(float(step), min(1.0, self.spent_s / (60 * self.minutes)) * steps) if self.minutes else float(step)

    def why_ended(self, step: int, steps: int) -> str:
        """What is said of a run of `steps` steps that ends after `step`."""
        return f"the run ends at step {step} of {steps}: its time is over (train.max_minutes={self.minutes:g})"


def spent(journal: Path, step: int) -> float:
    """Seconds that the first `step` steps of a run took, 0 of a new one. Raises as `journal.read`."""
    return sum(record.step_s for record in read(journal)[:step]) if step and journal.exists() else 0.0
