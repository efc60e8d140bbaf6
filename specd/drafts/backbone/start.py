"""The block draft that a run begins with: a new one, or the weights of another."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec

from specd.drafts.backbone.export import load_network, read_shape
from specd.drafts.backbone.form import DFLASH, Form, form_of
from specd.drafts.backbone.network import Backbone
from specd.drafts.backbone.settings import BlockConfig
from specd.drafts.backbone.shape import BlockShape, as_fed, draft_shape
from specd.drafts.base import TargetParts
from specd.drafts.directory import read_config
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


def initial_shape(config: BlockConfig, form: Form) -> BlockShape | None:
    """The shape of the draft that `config` begins with, None for a new one. Raises as `read_shape`."""
    if not config.init:
        return None
    found, path = initial_config(config.init)
    return read_shape(form_of(found, (DFLASH, form), str(path)), found, str(path))


def first_network(path: Path, form: Form, shape: BlockShape, seed: int = 0) -> Backbone:
    """The draft of a directory as one of `form`: a DFlash draft becomes the backbone of one with more parts.

    shape: of that one, whose other parts are new, as `seed` has them. Raises as `load_network`.
    """
    found = form_of(read_config(path), (DFLASH, form), str(path))
    network = load_network(found, path)
    if found is form:
        return network
    grown = form.network(shape, seed)
    grown.load_state_dict(grown.state_dict() | network.state_dict())
    return grown


def taps_of(config: BlockConfig, contract: TargetContract, form: Form) -> tuple[int, ...]:
    """The target layers that the draft reads: evenly spread, or those of the draft it begins with."""
    found = initial_shape(config, form)
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


def started(config: BlockConfig, target: TargetParts, seed: int, form: Form) -> Backbone:
    """The draft in its first state, on the CPU. Raises ConfigError where settings, target and `init` do not fit."""
    found = initial_shape(config, form)
    if found is not None and config.mask_token_id < 0:
        config = msgspec.structs.replace(config, mask_token_id=found.mask_token_id)
    asked = msgspec.structs.replace(
        draft_shape(config, target.config, taps_of(config, target.contract, form), form.shape, form.own),
        input_embedding_scale=target.embedding_scale(),
        output_multiplier=target.contract.logit_scale,
        final_logit_softcapping=target.contract.logit_softcap,
    )
    target.check(asked.vocab_size, asked.hidden_size)
    if found is None:
        return form.network(asked, seed)
    own = {name: f"draft.{name}" for name in form.own if isinstance(found, form.shape)}
    same_shape(_facts(found), _facts(asked), SETTINGS | own, config.init)
    if not as_fed(found, asked.input_embedding_scale):
        logger.warning(
            "draft.init=%r: its input_embedding_scale is %g, that of the target %g, with which it goes on: it has to "
            "learn that first",
            config.init, found.input_embedding_scale, asked.input_embedding_scale,
        )  # fmt: skip
    same = (
        "num_target_layers", "tie_word_embeddings", "input_embedding_scale", "output_multiplier",
        "final_logit_softcapping", *form.own,
    )  # fmt: skip
    if form.shape.names_causal:
        same += ("is_causal",)
    shape = form.shape(**msgspec.structs.asdict(found) | {name: getattr(asked, name) for name in same})
    draft = first_network(initial_config(config.init)[1], form, shape, seed)
    draft.shape = shape
    return draft


def _facts(shape: BlockShape) -> dict[str, Any]:
    facts: dict[str, Any] = msgspec.structs.asdict(shape)
    causal = [index for index, kind in enumerate(shape.layer_types) if shape.causal(kind)]
    return facts | {"number of taps": len(shape.taps), "causal layers": causal}
