"""The DFlash loss is the one that SpecForge trains with, and so is each gradient."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from drafts import CONFIG, VOCAB, deliver, make_batch, make_draft, taps_of
from peers import peer
from specd.drafts.blocks import sample_anchors
from specd.drafts.dflash.export import draft_config
from specd.drafts.dflash.objective import DFlash
from specd.protocol.batch import Batch, Delivery


def strong(**settings: Any) -> DFlash:
    """A draft whose weights are ten times those at the start of training, so that all of it matters."""
    objective = make_draft(msgspec.structs.replace(CONFIG, **settings))
    with torch.no_grad():
        for parameter in objective.module.parameters():
            parameter.mul_(10) if parameter.dim() > 1 else parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()))
    return objective


def of_specforge(objective: DFlash, delivery: Delivery) -> tuple[nn.Module, dict[str, Any]]:
    """Its OnlineDFlashModel with our weights and anchors, after its backward; and what it measured."""
    shape, batch, config = objective.draft.shape, delivery.batch, objective.config
    described = draft_config(shape, torch.float32)
    draft = peer("specforge.modeling.draft.dflash").DFlashDraftModel(
        transformers.Qwen3Config(**described, attn_implementation="sdpa")
    )
    draft.load_state_dict(objective.module.state_dict())
    embedding = nn.Embedding.from_pretrained(objective.embedding)
    head = nn.Linear(shape.hidden_size, VOCAB, bias=False).requires_grad_(False)
    head.weight.data.copy_(objective.lm_head)
    model = peer("specforge.algorithms.common.dflash_family_model").OnlineDFlashModel(
        draft,
        head,
        embedding,
        shape.mask_token_id,
        shape.block_size,
        "sdpa",
        config.num_anchors,
        objective.decay,
        objective_chunk_blocks=2,
    )
    chosen = [
        torch.from_numpy(anchors)
        for anchors in sample_anchors(
            batch.loss_mask, batch.lengths, batch.samples, batch.epoch, objective.seed, config.num_anchors
        )
    ]
    anchors = pad_sequence(chosen, batch_first=True)
    kept = pad_sequence([torch.ones_like(one, dtype=torch.bool) for one in chosen], batch_first=True)
    model._sample_anchor_positions = lambda *_: (anchors, kept)
    tokens, taps, labels = (
        pad_sequence(column.split(batch.lengths.tolist()), batch_first=True)
        for column in (
            torch.from_numpy(batch.tokens).long(),
            taps_of(delivery).flatten(1),
            torch.from_numpy(batch.loss_mask).float(),
        )
    )
    _, _, measured = model(tokens, taps, labels)
    measured["loss_terms"][0].backward()
    return draft, measured


BATCHES = [
    make_batch((31,), 1.1),
    make_batch((31,), 0.8),
    make_batch((23, 1, 9, 30), 1.1),
    make_batch((23, 1, 9, 30), 0.8),
]


WINDOWS: dict[str, Any] = {"num_layers": 3, "sliding_window": 6, "full_layers": 1}


@pytest.mark.parametrize("batch", BATCHES, ids=["one", "one with holes", "packed", "packed with holes"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"loss_decay": 0.0}, {"block_size": 6, "num_anchors": 50}, {"sliding_window": 4}, WINDOWS],
)
def test_specforge(batch: Batch, settings: dict[str, Any]) -> None:
    objective, delivery = strong(**settings), deliver(batch)
    loss = objective.loss(delivery)
    loss.sum.backward()  # type: ignore[no-untyped-call]
    theirs, measured = of_specforge(objective, delivery)
    total, weight = (float(part.detach()) for part in measured["loss_terms"])
    assert float(loss.sum.detach()) == pytest.approx(total, rel=1e-5)
    assert float(loss.weight) == pytest.approx(weight, rel=1e-5)
    correct, counted = (int(part) for part in measured["ratio_metrics"]["acc"])
    assert (loss.metrics["correct"].sum(), loss.metrics["counted"].sum()) == (correct, counted)
    assert counted > 10
    expected = dict(theirs.named_parameters())
    for name, parameter in objective.module.named_parameters():
        gradient = expected[name].grad
        assert gradient is not None
        assert parameter.grad is not None
        assert float((parameter.grad - gradient).norm() / gradient.norm()) < 1e-5, name
