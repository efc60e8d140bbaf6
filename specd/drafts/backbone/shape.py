"""What fixes a block draft's tensors: from settings and its target's config.json, or from its own config.json.

Module and tensor names are those of published checkpoints (arXiv 2602.06036).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, ClassVar, Literal

import msgspec

from specd.drafts.backbone.settings import BlockConfig
from specd.drafts.rope import Scaling, rope_theta
from specd.errors import ConfigError
from specd.protocol.capture import CaptureSpec

LayerType = Literal["full_attention", "sliding_attention"]


class BlockShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that fixes the draft's tensors and what it computes.

    taps: 0-based target layers whose states it reads, in the order of `fc`'s input. block_size: tokens a block,
    the anchor included. sliding_window: how many positions back the sliding layers see, 0 where there are none.
    is_causal: whether a token sees only those of its block that are before it, in every layer; None, as most
    checkpoints, for in sliding layers alone. attention_bias: queries, keys, values and output have biases.
    names_causal: whether every config.json says it. first: the first token of a block whose state guesses, 1 where that
    is the token itself, 0 where each guesses the one behind it. input_embedding_scale: its block embeddings over the
    rows of the target's table. output_multiplier, final_logit_softcapping: what it was trained to have done to its
    logits, 1 and 0 for nothing; no guess of each place by itself depends on it.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Scaling | None = None
    max_position_embeddings: int
    block_size: int
    mask_token_id: int
    taps: tuple[int, ...]
    num_target_layers: int
    layer_types: tuple[LayerType, ...]
    sliding_window: int = 0
    is_causal: bool | None = None
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    input_embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float = 0.0

    names_causal: ClassVar[bool] = False
    first: ClassVar[int] = 1

    @property
    def num_guesses(self) -> int:
        """Tokens that a block guesses."""
        return self.block_size - self.first

    def window(self, kind: LayerType) -> int:
        """How many positions back a layer of that kind sees, 0 for all."""
        return self.sliding_window if kind == "sliding_attention" else 0

    def causal(self, kind: LayerType) -> bool:
        """Whether a token in a layer of that kind sees only what is before it in its block."""
        return kind == "sliding_attention" if self.is_causal is None else self.is_causal

    def sizes(self) -> set[int]:
        """Of dimensions of its tensors and states, other than numbers of tokens."""
        heads, kv, hidden = self.num_heads, self.num_kv_heads, self.hidden_size
        halves = {self.head_dim * count // 2 for count in (1, 2, 2 * heads, 2 * kv)}
        return halves | {
            heads,
            kv,
            heads // kv,
            hidden,
            len(self.taps) * hidden,
            self.intermediate_size,
            self.block_size,
        }

    def problem(self) -> str | None:
        """Why no draft of this shape can exist, or None if it can."""
        if min(self.hidden_size, self.num_layers, self.num_kv_heads, self.intermediate_size, self.vocab_size) < 1:
            return "sizes and numbers of layers and heads must be positive"
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps >= 0):
            return f"rms_norm_eps {self.rms_norm_eps} is no number from 0 on"
        window = self.sliding_window if "sliding_attention" in self.layer_types else None
        if reason := conflict(self.num_heads, self.num_kv_heads, self.head_dim, self.block_size, window):
            return reason
        if not 0 <= self.mask_token_id < self.vocab_size:
            return (
                f"mask_token_id {self.mask_token_id} is no token of a vocabulary of {self.vocab_size}: "
                f"set draft.mask_token_id to one that the target never writes"
            )
        if not min(self.input_embedding_scale, self.output_multiplier) > 0 or self.final_logit_softcapping < 0:
            return (
                f"input_embedding_scale {self.input_embedding_scale}, output_multiplier {self.output_multiplier} and "
                f"final_logit_softcapping {self.final_logit_softcapping}: expected positive numbers, or 0 for the last"
            )
        if len(self.layer_types) != self.num_layers:
            return f"{len(self.layer_types)} layer_types for {self.num_layers} layers"
        return CaptureSpec(taps=self.taps).problem(self.num_target_layers)


def as_fed(shape: BlockShape, embedding_scale: float) -> bool:
    """Whether a draft wants its embeddings as its target makes them; figures in config.json may be rounded."""
    return abs(shape.input_embedding_scale / embedding_scale - 1) < 0.01


def conflict(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, window: int | None) -> str | None:
    """Why no draft can have these sizes, or None if one can. window: of its sliding layers, None where none slides."""
    if num_heads % num_kv_heads:
        return f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}"
    if head_dim < 2 or head_dim % 2:
        return f"head_dim {head_dim} is not a positive even number"
    if block_size < 2:
        return f"block_size {block_size} leaves nothing to predict: it counts the anchor, so give at least 2"
    if window is not None and window < block_size:
        return f"sliding_window {window} is shorter than a block of {block_size} tokens"
    return None


def draft_shape(
    config: BlockConfig,
    target_config: dict[str, Any],
    taps: tuple[int, ...],
    kind: type[BlockShape] = BlockShape,
    own: Collection[str] = (),
) -> BlockShape:
    """The draft that `config` asks for beside the target of `target_config`, the content of its config.json.

    own: fields of `kind` that BlockShape lacks; `config` has them under the same names.
    The draft rotates with the target's base frequency but without its scaling for long contexts: its positions are
    its own. Raises ConfigError for a missing key or a shape that cannot be.
    """
    target: dict[str, Any] = target_config.get("text_config") or target_config
    try:
        hidden_size, num_heads = int(target["hidden_size"]), int(target["num_attention_heads"])
        window = config.sliding_window
        shape = kind(
            hidden_size=hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads or num_heads,
            num_kv_heads=config.num_kv_heads or int(target.get("num_key_value_heads") or num_heads),
            head_dim=config.head_dim or int(target.get("head_dim") or hidden_size // num_heads),
            intermediate_size=config.intermediate_size or int(target["intermediate_size"]),
            vocab_size=int(target["vocab_size"]),
            rms_norm_eps=float(target.get("rms_norm_eps", 1e-6)),
            rope_theta=rope_theta(target),
            max_position_embeddings=int(target["max_position_embeddings"]),
            block_size=config.block_size,
            mask_token_id=config.mask_token_id,
            taps=taps,
            num_target_layers=int(target["num_hidden_layers"]),
            layer_types=layer_types(config),
            sliding_window=window,
            is_causal=False if kind.names_causal or (window and not config.sliding_causal) else None,
            tie_word_embeddings=bool(target.get("tie_word_embeddings", False)),
            **{name: getattr(config, name) for name in own},
        )
    except KeyError as error:
        raise ConfigError(f"the target's config.json has no key {error}: a draft takes its shape from it") from None
    if reason := shape.problem():
        raise ConfigError(f"draft: {reason}")
    return shape


def layer_types(config: BlockConfig) -> tuple[LayerType, ...]:
    """The kinds of the layers, the first one first. Raises ConfigError for `full_layers` that contradict the others."""
    full = config.full_layers if config.sliding_window else config.num_layers
    if config.full_layers and (not config.sliding_window or full >= config.num_layers):
        raise ConfigError(
            f"draft.full_layers={config.full_layers} of {config.num_layers} layers with "
            f"draft.sliding_window={config.sliding_window}: expected a window, and fewer full layers than layers; "
            f"leave both out for full attention in every layer"
        )
    kinds: tuple[LayerType, LayerType] = ("sliding_attention", "full_attention")
    return (kinds[0],) * (config.num_layers - full) + (kinds[1],) * full
