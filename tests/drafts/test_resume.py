"""A run of any draft that is killed and resumed is the run that was not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import drafts
import dspark
import eagle
from dflash2 import make_dflash2
from runs import Plan, Source, curve, run, same, weights
from specd.drafts.eagle3.objective import Eagle3
from specd.protocol.batch import Batch, Delivery

PLAN = Plan(epochs=1, per_epoch=12, size=3)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop may catch it."""


class Kind(NamedTuple):
    """A draft: how a fresh one is made, what it is given, and in front of which batches its run dies."""

    made: Callable[[], Any]
    deliver: Callable[..., Delivery]
    deaths: Iterable[int]


KINDS = {
    "dflash2": Kind(make_dflash2, drafts.deliver, (1, 6, 8, 11)),
    "dspark": Kind(dspark.make_dspark, dspark.deliver, (8,)),
    "eagle3": Kind(lambda: Eagle3(eagle.CONFIG, eagle.parts()), eagle.deliver, range(12)),
}


class States(Source):
    """What a draft wants of each batch, of its own seed; dies in front of the batch `at`."""

    def __init__(self, kind: Kind, at: int | None = None) -> None:
        super().__init__()
        self.kind, self.at = kind, at

    def stream(self, batches: Iterable[Batch]) -> Iterator[Delivery]:
        for batch in batches:
            if batch.index == self.at:
                raise Killed
            yield self.kind.deliver(batch, seed=batch.index)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[torch.Tensor]]]:
    """Of a draft: four steps of three batches, with a checkpoint after every second."""

    @functools.cache
    def undisturbed(name: str) -> tuple[Path, list[torch.Tensor]]:
        directory, kind = tmp_path_factory.mktemp(name), KINDS[name]
        objective, _ = run(directory, objective=kind.made(), plan=PLAN, source=States(kind))
        return directory, weights(objective)

    return undisturbed


@pytest.mark.parametrize(("name", "at"), [(name, at) for name, kind in KINDS.items() for at in kind.deaths])
def test_a_resumed_run_goes_on_bit_for_bit(
    name: str, at: int, whole: Callable[[str], tuple[Path, list[torch.Tensor]]], tmp_path: Path
) -> None:
    kind, (directory, expected) = KINDS[name], whole(name)
    with pytest.raises(Killed):
        run(tmp_path, objective=kind.made(), plan=PLAN, source=States(kind, at))
    torch.manual_seed(at)
    kept = bool(list((tmp_path / "checkpoints").glob("step-*")))
    assert kept is (at >= 6)
    resumed, _ = run(tmp_path, objective=kind.made(), plan=PLAN, source=States(kind), resume=kept)
    assert len(curve(tmp_path)) == 4
    assert curve(tmp_path) == curve(directory)
    assert same(weights(resumed), expected)
