"""Settings of a DFlash draft."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from specd.config.settings import AttentionKind, Config, NotNegative, Positive


class DFlashConfig(Config, kw_only=True, frozen=True):
    """The DFlash draft (arXiv 2602.06036).

    num_layers: its depth. num_taps: how many of the target's layers it reads, evenly spread. loss_decay: γ of the
    position weights, 0 for none, −1 for the paper's choice. block_size: tokens a block, its anchor included.
    num_anchors: blocks drawn from a sequence, at most. loss_chunk: predictions whose logits exist at a time.
    attention: `flex` needs a GPU. num_heads, num_kv_heads, head_dim, intermediate_size: 0 takes the target's.
    mask_token_id: a token that neither texts nor the target have; −1 and the trainer chooses a reserved or padded one,
    or that of `init`. sliding_window: positions back that layers see, 0 for full attention in every layer.
    full_layers: how many of the last layers see everything all the same. sliding_causal: in a sliding layer a token of
    a block sees only those before it, as in published checkpoints; false lets it see the whole block. init: directory
    of a draft or a run whose weights training begins with.
    """

    num_layers: Positive = 5
    num_taps: Positive = 5
    block_size: Annotated[int, Meta(ge=2)] = 16
    num_anchors: Positive = 512
    loss_decay: float = -1.0
    mask_token_id: Annotated[int, Meta(ge=-1)] = -1
    intermediate_size: NotNegative = 0
    num_heads: NotNegative = 0
    num_kv_heads: NotNegative = 0
    head_dim: NotNegative = 0
    sliding_window: NotNegative = 0
    sliding_causal: bool = True
    full_layers: NotNegative = 0
    attention: AttentionKind = "auto"
    loss_chunk: Positive = 1024
    init: str = ""
