"""The DFlash loss is the one that SpecForge trains with, and so is each gradient."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from drafts import CONFIG, deliver, make_batch, make_draft
from peer_dflash import of_specd, of_specforge
from specd.drafts.dflash.objective import DFlash
from specd.protocol.batch import Batch


def strong(**settings: Any) -> DFlash:
    """A draft whose weights are ten times those at the start of training, so that all of it matters."""
    objective = make_draft(msgspec.structs.replace(CONFIG, **settings))
    with torch.no_grad():
        for parameter in objective.module.parameters():
            parameter.mul_(10) if parameter.dim() > 1 else parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()))
    return objective


SEQUENCES = (23, 1, 9, 30)
BATCHES = [make_batch(lengths, density) for lengths in ((31,), SEQUENCES) for density in (1.1, 0.8)]


@pytest.mark.parametrize("batch", BATCHES, ids=["one", "one with holes", "packed", "packed with holes"])
@pytest.mark.parametrize("settings", [{}, {"loss_decay": 0.0}, {"block_size": 6, "num_anchors": 50}])
def test_specforge(batch: Batch, settings: dict[str, Any]) -> None:
    objective, delivery = strong(**settings), deliver(batch)
    ours, theirs = of_specd(objective, delivery), of_specforge(objective, delivery)
    assert ours.counted > 10
    assert (ours.counted, ours.correct) == (theirs.counted, theirs.correct)
    assert (ours.total, ours.weight) == pytest.approx((theirs.total, theirs.weight), rel=1e-5)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert float((ours.gradients[name] - gradient).norm() / gradient.norm()) < 1e-5, name
