"""DFlash as SpecForge trains it, on the weights, anchors and batches of specd's own objective."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from drafts import draft_config, taps_of
from peers import peer
from specd.drafts.backbone.objective import BlockObjective
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
        float(loss.sum.detach()), float(loss.weight), counted, correct, gradients_of(objective.module, loss.sum)
    )


def of_specforge(objective: DFlash, delivery: Delivery) -> Result:
    """Its OnlineDFlashModel, sequences side by side."""
    shape, config = objective.draft.shape, objective.config
    described: dict[str, Any] = {**draft_config(shape, torch.float32), "attn_implementation": "sdpa"}
    draft = peer("specforge.modeling.draft.dflash").DFlashDraftModel(transformers.Qwen3Config(**described))
    draft.load_state_dict(objective.module.state_dict())
    embedding, head = target_modules(objective)
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
        loss_type="dpace" if config.loss == "dpace" else "dflash",
        dpace_alpha=config.dpace_alpha,
    )
    model._sample_anchor_positions = lambda *_: anchors_of(objective, delivery)
    tokens, taps, labels = side_by_side(delivery)
    _, _, measured = model(tokens, taps, labels)
    total, weight = measured["loss_terms"]
    correct, counted = (int(part) for part in measured["ratio_metrics"]["acc"])
    return Result(float(total.detach()), float(weight), counted, correct, gradients_of(draft, total))


def target_modules(objective: BlockObjective) -> tuple[nn.Embedding, nn.Linear]:
    """The target's embedding and lm_head."""
    shape = objective.draft.shape
    embedding, head = nn.Embedding(shape.vocab_size, shape.hidden_size), nn.Linear(1, 1, bias=False)
    embedding.weight = nn.Parameter(objective.embedding, requires_grad=False)
    head.weight = nn.Parameter(objective.lm_head, requires_grad=False)
    return embedding, head


def anchors_of(objective: BlockObjective, delivery: Delivery) -> tuple[Tensor, Tensor]:
    """The anchors of each sequence, and which of these are there, [B, most]."""
    batch = delivery.batch
    drawn = sample_anchors(
        batch.loss_mask, batch.lengths, batch.samples, batch.epoch, objective.seed, objective.config.num_anchors
    )
    anchors = pad_sequence([torch.from_numpy(one) for one in drawn], batch_first=True)
    return anchors, pad_sequence([torch.ones(one.size, dtype=torch.bool) for one in drawn], batch_first=True)


def side_by_side(delivery: Delivery, *states: Tensor) -> list[Tensor]:
    """Tokens, taps, labels and more states [T, H] of a batch, its sequences padded to the longest."""
    batch = delivery.batch
    tokens, labels = torch.from_numpy(batch.tokens).long(), torch.from_numpy(batch.loss_mask).float()
    columns, lengths = (tokens, taps_of(delivery).flatten(1), labels, *states), batch.lengths.tolist()
    return [pad_sequence(list(torch.split(one, lengths)), batch_first=True) for one in columns]


def of_speculators(objective: DFlash, delivery: Delivery) -> Result:
    """Its DFlashDraftModel, sequences behind each other. No block may reach over the end of its sequence.

    It predicts what the target would say: states are made up with which that is the text.
    """
    shape, batch, config = objective.draft.shape, delivery.batch, objective.config
    core, losses = peer("speculators.models.dflash.core"), peer("speculators.losses")
    eager: dict[str, Any] = draft_config(shape, torch.float32) | {"attn_implementation": "eager"}
    layers = transformers.Qwen3Config(**eager)
    described = peer("speculators.models.dflash.config").DFlashSpeculatorConfig(
        transformer_layer_config=layers, draft_vocab_size=shape.vocab_size, block_size=shape.block_size,
        mask_token_id=shape.mask_token_id, aux_hidden_state_layer_ids=[tap + 1 for tap in shape.taps],
    )  # fmt: skip
    model = core.DFlashDraftModel(config=described).eval()
    masks = peer("speculators.models.attention").create_float_mask
    model._create_mask_fn = functools.partial(masks, dtype=torch.float32)
    unit = F.normalize(objective.lm_head, dim=-1)
    for module, weight in (
        (model.embed_tokens, objective.embedding), (model.lm_head, objective.lm_head), (model.verifier_lm_head, unit)
    ):  # fmt: skip
        module.weight.data.copy_(weight)
    model.verifier_norm = nn.Identity()
    model.load_state_dict(objective.module.state_dict(), strict=False)
    anchors = torch.from_numpy(objective.draw(batch).layout.anchors)
    tokens, lengths = torch.from_numpy(batch.tokens).long(), batch.lengths.tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "select_anchors", lambda *_: (anchors, torch.ones(len(anchors), dtype=torch.bool)))
        *_, total, _ = model(
            hidden_states=taps_of(delivery).flatten(1)[None],
            input_ids=tokens[None],
            loss_mask=torch.from_numpy(batch.loss_mask).float()[None],
            verifier_last_hidden_states=unit[tokens.roll(-1)][None],
            document_ids=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None],
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
            loss_config=losses.resolve_loss_config("ce", "eager"),
            max_anchors=len(anchors),
            gamma=objective.decay,
            per_position_loss_weight="dpace" if config.loss == "dpace" else "fixed-exp-decay",
            dpace_alpha=config.dpace_alpha,
        )
    counted = len(objective.draw(batch).rows)
    total = total * (counted + 1e-5)
    return Result(float(total.detach()), counted, counted, -1, gradients_of(model, total))


def gradients_of(model: nn.Module, total: Tensor) -> dict[str, Tensor]:
    """Of a loss, by the names of trained parameters."""
    model.zero_grad()
    total.backward()  # type: ignore[no-untyped-call]
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    model.zero_grad()
    return found
