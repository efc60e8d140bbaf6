"""The DFlash loss is the one that SpecForge and Speculators train with, and so is each gradient."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from drafts import CONFIG, deliver, make_batch, make_draft
from peer_dflash import Result, of_specd, of_specforge, of_speculators
from specd.drafts.dflash.objective import DFlash
from specd.protocol.batch import Batch


def strong(**settings: Any) -> DFlash:
    """A draft whose weights are ten times those at the start of training, so that all of it matters."""
    objective = make_draft(msgspec.structs.replace(CONFIG, **{"loss": "decay"} | settings))
    with torch.no_grad():
        for parameter in objective.module.parameters():
            parameter.mul_(10) if parameter.dim() > 1 else parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()))
    return objective


SEQUENCES = (23, 1, 9, 30)
DPACE = {"block_size": 6, "num_anchors": 50, "loss": "dpace", "dpace_alpha": 0.2}
BATCHES = [make_batch(lengths, density) for lengths in ((31,), SEQUENCES) for density in (1.1, 0.8)]


@pytest.mark.parametrize("batch", BATCHES, ids=["one", "one with holes", "packed", "packed with holes"])
@pytest.mark.parametrize("settings", [{}, {"loss_decay": 0.0}, {"block_size": 6, "num_anchors": 50}, DPACE])
def test_specforge(batch: Batch, settings: dict[str, Any]) -> None:
    objective, delivery = strong(**settings), deliver(batch)
    ours, theirs = of_specd(objective, delivery), of_specforge(objective, delivery)
    assert ours.counted > 10
    assert (ours.counted, ours.correct) == (theirs.counted, theirs.correct)
    assert ours.total == pytest.approx(theirs.total, rel=1e-5)
    if objective.config.loss == "decay":  # else it divides by sequences
        assert ours.weight == pytest.approx(theirs.weight, rel=1e-5)
    same(ours, theirs)


@pytest.mark.parametrize(
    "settings", [{"loss_decay": 3.0}, {"loss": "dpace"}, {"loss": "dpace", "dpace_alpha": 1.0}, DPACE]
)
def test_speculators(settings: dict[str, Any]) -> None:
    objective, batch = strong(**settings), make_batch(SEQUENCES, 0.8)
    labels = batch.loss_mask.copy()
    for end in np.cumsum(batch.lengths):  # there it would count those of the next sequence
        labels[max(0, end - objective.draft.shape.block_size) : end] = False
    delivery = deliver(msgspec.structs.replace(batch, loss_mask=labels))
    ours, theirs = of_specd(objective, delivery), of_speculators(objective, delivery)
    assert ours.counted > 10
    assert ours.total == pytest.approx(theirs.total, rel=1e-5)
    same(ours, theirs)


def same(ours: Result, theirs: Result) -> None:
    """Every gradient."""
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert float((ours.gradients[name] - gradient).norm() / gradient.norm()) < 1e-5, name
