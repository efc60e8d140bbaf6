"""DSpark as SpecForge trains it, on the weights, anchors and batches of specd's own objective."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from peer_dflash import Result, anchors_of, gradients_of, side_by_side, target_modules
from peers import peer
from specd.drafts.backbone.export import draft_config
from specd.drafts.dspark.objective import DSPARK, HEADS, DSpark
from specd.drafts.dspark.settings import DSparkConfig
from specd.protocol.batch import Delivery


def specforge_config(objective: DSpark) -> dict[str, Any]:
    """What its DSparkDraftModel is made of: keys of its heads inside dflash_config."""
    shape = objective.draft.shape
    described: dict[str, Any] = draft_config(DSPARK, shape, torch.float32) | {"attn_implementation": "sdpa"}
    own = {name: getattr(shape, name) for name in DSPARK.own}
    described["dflash_config"] |= own | HEADS | {"projector_type": "dspark"}
    return described | {"architectures": ["DSparkDraftModel"]}


def of_specforge(objective: DSpark, delivery: Delivery) -> tuple[Result, dict[str, float]]:
    """Its OnlineDSparkModel, sequences side by side; and its own figures: quotients, by name."""
    shape, config = objective.draft.shape, objective.config
    assert isinstance(config, DSparkConfig)
    assert delivery.final is not None
    draft = peer("specforge.modeling.draft.dspark").DSparkDraftModel(
        transformers.Qwen3Config(**specforge_config(objective))
    )
    draft.load_state_dict(objective.module.state_dict())
    embedding, head = target_modules(objective)
    model = peer("specforge.algorithms.common.dflash_family_model").OnlineDSparkModel(
        draft,
        head,
        embedding,
        shape.mask_token_id,
        shape.block_size,
        "sdpa",
        config.num_anchors,
        config.loss_decay,
        config.ce_weight,
        config.l1_weight,
        config.confidence_weight,
        objective_chunk_blocks=2,
    )
    model._sample_anchor_positions = lambda *_: anchors_of(objective, delivery)
    tokens, taps, labels, final = side_by_side(delivery, delivery.final)
    loss, _, measured = model(tokens, taps, labels, final)
    ratios = measured["ratio_metrics"]
    weight = float(ratios["ce_loss"][1])
    total = loss * weight
    correct, counted = (int(part) for part in ratios["acc"])
    figures = {name: float(one.sum() / other.sum()) for name, (one, other) in ratios.items()}
    return Result(float(total.detach()), weight, counted, correct, gradients_of(draft, total)), figures
