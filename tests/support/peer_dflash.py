"""DFlash as SpecForge trains it, on the weights, anchors and batches of specd's own objective."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from drafts import draft_config, taps_of
from peers import peer
from specd.drafts.blocks import sample_anchors
from specd.drafts.dflash.objective import DFlash
from specd.protocol.batch import Delivery


class Result(NamedTuple):
    """total: weighted sum over predictions. weight: of all. counted, correct: predictions. gradients: of `total`."""

    total: float
    weight: float
    counted: int
    correct: int
    gradients: dict[str, Tensor]


def of_specd(objective: DFlash, delivery: Delivery) -> Result:
    """What specd says itself."""
    loss = objective.loss(delivery)
    counted, correct = (int(loss.metrics[key].sum()) for key in ("counted", "correct"))
    return Result(
        float(loss.sum.detach()), float(loss.weight), counted, correct, _gradients(objective.module, loss.sum)
    )


def of_specforge(objective: DFlash, delivery: Delivery) -> Result:
    """Its OnlineDFlashModel, sequences side by side."""
    shape, batch, config = objective.draft.shape, delivery.batch, objective.config
    described: dict[str, Any] = {**draft_config(shape, torch.float32), "attn_implementation": "sdpa"}
    draft = peer("specforge.modeling.draft.dflash").DFlashDraftModel(transformers.Qwen3Config(**described))
    draft.load_state_dict(objective.module.state_dict())
    embedding, head = nn.Embedding(shape.vocab_size, shape.hidden_size), nn.Linear(1, 1, bias=False)
    embedding.weight = nn.Parameter(objective.embedding, requires_grad=False)
    head.weight = nn.Parameter(objective.lm_head, requires_grad=False)
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
    drawn = sample_anchors(
        batch.loss_mask, batch.lengths, batch.samples, batch.epoch, objective.seed, config.num_anchors
    )
    anchors = pad_sequence([torch.from_numpy(one) for one in drawn], batch_first=True)
    kept = pad_sequence([torch.ones(one.size, dtype=torch.bool) for one in drawn], batch_first=True)
    model._sample_anchor_positions = lambda *_: (anchors, kept)
    columns = (torch.from_numpy(batch.tokens).long(), taps_of(delivery).flatten(1), torch.from_numpy(batch.loss_mask))
    tokens, taps, labels = (
        pad_sequence(list(torch.split(one, batch.lengths.tolist())), batch_first=True) for one in columns
    )
    _, _, measured = model(tokens, taps, labels.float())
    total, weight = measured["loss_terms"]
    correct, counted = (int(part) for part in measured["ratio_metrics"]["acc"])
    return Result(float(total.detach()), float(weight), counted, correct, _gradients(draft, total))


def _gradients(model: nn.Module, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()  # type: ignore[no-untyped-call]
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    model.zero_grad()
    return found
