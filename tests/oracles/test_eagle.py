"""EAGLE-3's loss, its gradients and its vocabulary are those that SpecForge and Speculators train with."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from drafts import HIDDEN, VOCAB, make_batch
from eagle import CONFIG, deliver, make_eagle
from peer_eagle import Result, of_specd, of_specforge, of_speculators
from peers import peer
from specd.drafts.logits import LogitTransform
from specd.drafts.taught import Teacher, _inside, _teach
from specd.drafts.vocabulary import draft_vocabulary
from specd.protocol.batch import Batch

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


BATCHES = [
    masked((40,), 1.1),
    masked((40,), 0.8),
    masked((23, 1, 9, 31, 2, 12), 1.1),
    masked((23, 1, 9, 31, 2, 12), 0.8),
]
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
    return max(differences.values())


@pytest.mark.parametrize("batch", BATCHES, ids=IDS)
@pytest.mark.parametrize(
    "settings", [{}, {"fc_norm": True}, {"draft_vocab_size": 0}, {"loss_decay": 1.0, "num_steps": 3}]
)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_specforges_teacher(dtype: torch.dtype) -> None:
    """Its compact one, with ties as they are common in bfloat16."""
    generator = torch.Generator().manual_seed(5)
    head, states = (torch.randn(rows, HIDDEN, generator=generator).to(dtype) for rows in (VOCAB, 300))
    head[50:90] = head[:40]
    guessed = torch.zeros(VOCAB, dtype=torch.bool)
    guessed[torch.randperm(VOCAB, generator=generator)[:60]] = True
    compute = peer("specforge.core.compact_teacher").compute_target_from_hidden
    shares, _, best, inside = compute(
        states[None], head, guessed, torch.ones(1, states.shape[0], 1, dtype=torch.int32), chunk_size=40
    )
    teacher = Teacher(head, guessed.nonzero()[:, 0], LogitTransform(), states, states.shape[0])
    own_best, own_shares = _teach(teacher, slice(None))
    assert torch.equal(own_best, best[0])
    assert torch.equal(_inside(own_best, teacher.vocabulary).counts, inside[0, :, 0].float())
    torch.testing.assert_close(own_shares, shares[0])


@pytest.mark.parametrize("size", [1, 40, 97])
@pytest.mark.parametrize("distinct", [3, 60, 97])
def test_the_vocabulary_is_speculators(size: int, distinct: int) -> None:
    """With many ties, and with more room than there are distinct labels."""
    rng = np.random.default_rng(size * distinct)
    counts = np.zeros(VOCAB, np.int64)
    counts[rng.permutation(VOCAB)[:distinct]] = rng.integers(1, 5, distinct)
    counts[rng.integers(VOCAB)] = 1000  # or a small one would not cover half of them
    build = peer("speculators.train.vocab_mapping").build_vocab_mappings_from_distribution
    offsets, guessed = build({token: int(count) for token, count in enumerate(counts) if count}, size, VOCAB)
    chosen = draft_vocabulary(counts, size)
    assert chosen.tolist() == (offsets + torch.arange(size)).tolist() == guessed.nonzero()[:, 0].tolist()
