"""A run of DSpark that is killed and resumed is the run that was not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark import deliver, make_dspark
from runs import Plan, Source, curve, run, same, weights
from specd.protocol.batch import Batch, Delivery

PLAN = Plan(epochs=1, per_epoch=12, size=3)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop may catch it."""


class States(Source):
    """Taps of a batch's own; dies in front of the batch `at`."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at = at

    def stream(self, batches: Iterable[Batch]) -> Iterator[Delivery]:
        for batch in batches:
            if batch.index == self.at:
                raise Killed
            yield deliver(batch, seed=batch.index)


def made() -> Any:
    return make_dspark()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """Four steps of three batches, with a checkpoint after every second."""
    directory = tmp_path_factory.mktemp("whole")
    objective, _ = run(directory, objective=made(), plan=PLAN, source=States())
    return directory, weights(objective)


@pytest.mark.parametrize("at", [8])
def test_a_resumed_run_goes_on_bit_for_bit(at: int, whole: tuple[Path, list[torch.Tensor]], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, objective=made(), plan=PLAN, source=States(at))
    torch.manual_seed(at)
    resumed, _ = run(tmp_path, objective=made(), plan=PLAN, source=States(), resume=True)
    assert len(curve(tmp_path)) == 4
    assert curve(tmp_path) == curve(whole[0])
    assert same(weights(resumed), whole[1])
