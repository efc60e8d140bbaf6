"""Sliding layers are those that SpecForge trains: the same loss and gradients."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from drafts import CONFIG, deliver, make_batch, make_draft
from peer_dflash import of_specd, of_specforge
from specd.protocol.batch import Batch

SEQUENCES = (23, 1, 9, 30)
BATCHES = [make_batch(lengths, density) for lengths in ((31,), SEQUENCES) for density in (1.1, 0.8)]
MIXED = {"num_layers": 5, "sliding_window": 6, "full_layers": 1}


@pytest.mark.parametrize("batch", BATCHES, ids=["one", "one with holes", "packed", "packed with holes"])
@pytest.mark.parametrize("settings", [{"sliding_window": 4}, {"sliding_window": 9}, MIXED])
def test_specforge(batch: Batch, settings: dict[str, Any]) -> None:
    objective, delivery = make_draft(msgspec.structs.replace(CONFIG, **settings)), deliver(batch)
    with torch.no_grad():
        for parameter in objective.module.parameters():  # so that all of it matters
            parameter.mul_(10) if parameter.dim() > 1 else parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()))
    ours, theirs = of_specd(objective, delivery), of_specforge(objective, delivery)
    assert ours.counted > 10
    assert (ours.counted, ours.correct) == (theirs.counted, theirs.correct)
    differences = {"loss": abs(ours.total - theirs.total) / abs(theirs.total)}
    for name, gradient in theirs.gradients.items():
        differences[name] = float((ours.gradients[name] - gradient).norm() / gradient.norm())
    print(max(differences.values()))
    assert max(differences.values()) < 1e-5
