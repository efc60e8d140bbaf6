"""The DFlash draft that a run begins with: a new one, or the weights of another."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from specd.drafts.base import TargetParts
from specd.drafts.dflash.export import load_draft, read_shape
from specd.drafts.dflash.model import DFlashDraft, DraftShape, as_fed, draft_shape
from specd.drafts.dflash.settings import DFlashConfig
from specd.drafts.initial import initial_config, same_shape
from specd.drafts.taps import spread_taps
from specd.errors import ConfigError
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import TargetContract

logger = logging.getLogger(__name__)
SETTINGS = {
    "hidden_size": "", "vocab_size": "", "num_layers": "draft.num_layers", "num_heads": "draft.num_heads",
    "num_kv_heads": "draft.num_kv_heads", "head_dim": "draft.head_dim",
    "intermediate_size": "draft.intermediate_size", "block_size": "draft.block_size",
    "mask_token_id": "draft.mask_token_id", "number of taps": "draft.num_taps",
    "layer_types": "draft.sliding_window or draft.full_layers", "sliding_window": "draft.sliding_window",
    "causal layers": "draft.sliding_causal",
}  # fmt: skip
"""What of the shape must be equal, and which setting says it."""


def initial_shape(config: DFlashConfig) -> DraftShape | None:
    """The shape of the draft that `config` begins with, None for a new one. Raises as `read_shape`."""
    if not config.init:
        return None
    found, path = initial_config(config.init)
    return read_shape(found, str(path))


def taps_of(config: DFlashConfig, contract: TargetContract) -> tuple[int, ...]:
    """The target layers that the draft reads: evenly spread, or those of the draft it begins with."""
    found = initial_shape(config)
    if found is None:
        return spread_taps(contract.num_layers, config.num_taps, contract.tap_layers)
    if len(found.taps) != config.num_taps:
        raise ConfigError(
            f"draft.init={config.init!r}: its number of taps is {len(found.taps)}, expected this run's "
            f"{config.num_taps}: change draft.num_taps, or leave draft.init out"
        )
    if reason := CaptureSpec(taps=found.taps).problem(contract.num_layers):
        raise ConfigError(f"draft.init={config.init!r} is a draft for another target: {reason}")
    return found.taps


def started(config: DFlashConfig, target: TargetParts, seed: int) -> DFlashDraft:
    """The draft in its first state, on the CPU. Raises ConfigError where settings, target and `init` do not fit."""
    found = initial_shape(config)
    if found is not None and config.mask_token_id < 0:
        config = msgspec.structs.replace(config, mask_token_id=found.mask_token_id)
    asked = msgspec.structs.replace(
        draft_shape(config, target.config, taps_of(config, target.contract)),
        input_embedding_scale=target.embedding_scale(),
        output_multiplier=target.contract.logit_scale,
        final_logit_softcapping=target.contract.logit_softcap,
    )
    target.check(asked.vocab_size, asked.hidden_size)
    if found is None:
        return DFlashDraft(asked, seed)
    same_shape(_facts(found), _facts(asked), SETTINGS, config.init)
    draft = load_draft(initial_config(config.init)[1])
    if not as_fed(found, asked.input_embedding_scale):
        logger.warning(
            "draft.init=%r: its input_embedding_scale is %g, that of the target %g, with which it goes on: it has to "
            "learn that first",
            config.init, found.input_embedding_scale, asked.input_embedding_scale,
        )  # fmt: skip
    same = (
        "num_target_layers", "tie_word_embeddings", "input_embedding_scale", "output_multiplier",
        "final_logit_softcapping",
    )  # fmt: skip
    draft.shape = msgspec.structs.replace(found, **{name: getattr(asked, name) for name in same})
    return draft


def _facts(shape: DraftShape) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.structs.asdict(shape)
    causal = [index for index, kind in enumerate(shape.layer_types) if shape.causal(kind)]
    return facts | {"number of taps": len(shape.taps), "causal layers": causal}
