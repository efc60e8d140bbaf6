"""The EAGLE-3 loss is the one that SpecForge and Speculators train with, and so is each gradient."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from drafts import VOCAB, make_batch
from eagle import COUNTS, CONFIG, deliver, make_eagle
from peer_eagle import Result, of_specd, of_specforge, of_speculators
from peers import peer
from specd.drafts.eagle3.settings import Eagle3Config
from specd.drafts.vocabulary import draft_vocabulary
from specd.protocol.batch import Batch, Delivery

SETTINGS = msgspec.structs.replace(CONFIG, num_steps=7, loss_chunk=16)
PROMPT = 7
"""Tokens at the start of a sequence that are no labels: at least as many as there are steps."""


def masked(lengths: tuple[int, ...], density: float, seed: int = 0) -> Batch:
    """Sequences whose labels have holes in them, each behind a prompt."""
    batch = make_batch(lengths, density, seed)
    starts = np.cumsum(lengths) - lengths
    for start in starts:
        batch.loss_mask[start : start + PROMPT] = False
    return batch


BATCHES = [masked((40,), 1.1), masked((40,), 0.8), masked((23, 1, 9, 31, 2, 12), 1.1), masked((23, 1, 9, 31, 2, 12), 0.8)]
IDS = ["one", "one with holes", "packed", "packed with holes"]


def hold(ours: Result, theirs: Result) -> float:
    """The largest relative difference, of the loss or of a gradient; rows and hits are the same."""
    assert min(ours.counted) > 0
    assert sum(ours.counted) > 20
    assert ours.counted == theirs.counted
    assert theirs.correct in (None, ours.correct)
    differences = {"loss": abs(ours.total - theirs.total) / abs(theirs.total)}
    for name, gradient in theirs.gradients.items():
        assert gradient.norm() > 0, name
        differences[name] = float((ours.gradients[name] - gradient).norm() / gradient.norm())
    print({name: f"{value:.1e}" for name, value in differences.items()})
    return max(differences.values())


@pytest.mark.parametrize("batch", BATCHES, ids=IDS)
@pytest.mark.parametrize("settings", [{}, {"fc_norm": True}, {"draft_vocab_size": 0}, {"loss_decay": 1.0, "num_steps": 3}])
@pytest.mark.parametrize("compact", [False, True])
def test_specforge(batch: Batch, settings: dict[str, Any], compact: bool) -> None:
    objective, delivery = make_eagle(msgspec.structs.replace(SETTINGS, **settings)), deliver(batch)
    assert hold(of_specd(objective, delivery), of_specforge(objective, delivery, compact=compact)) < 1e-5


@pytest.mark.parametrize("batch", BATCHES, ids=IDS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"norm_output": True}, {"fc_norm": True}, {"norm_output": True, "fc_norm": True}, {"draft_vocab_size": 0}],
)
def test_speculators(batch: Batch, settings: dict[str, Any]) -> None:
    objective, delivery = make_eagle(msgspec.structs.replace(SETTINGS, **settings)), deliver(batch)
    assert hold(of_specd(objective, delivery), of_speculators(objective, delivery)) < 1e-5
