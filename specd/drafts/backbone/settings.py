"""Settings of every block draft."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from specd.config.settings import AttentionKind, Config, NotNegative, Positive


class BlockConfig(Config, kw_only=True, frozen=True):
    """A draft that guesses blocks of tokens (DFlash, arXiv 2602.06036).

    num_layers: its depth. num_taps: how many of the target's layers it reads, evenly spread. loss: what predictions
    weigh; `decay` by their offset alone, `dpace` (arXiv 2605.18810) by how likely the draft is to get there.
    loss_decay: γ of the position weights under `decay`, 0 for none, −1 for the paper's choice. dpace_alpha: under
    `dpace`, 1 for weights that fall in a straight line, smaller ones for what the draft has learnt.
    block_size: tokens a block, its anchor included. num_anchors: blocks drawn from a sequence, at most.
    loss_chunk: predictions whose logits exist at a time. attention: `flex` needs a GPU.
    num_heads, num_kv_heads, head_dim, intermediate_size: 0 takes the target's.
    mask_token_id: a token that neither texts nor the target have; −1 and the trainer chooses a reserved or padded one,
    or that of `init`.
    sliding_window: positions back that layers see, 0 for full attention in every layer. full_layers: how many of the
    last layers see everything all the same. sliding_causal: in a sliding layer a token of a block sees only those
    before it, as in published checkpoints; false lets it see the whole block.
    init: directory of a draft or a run whose weights training begins with.
    """

    num_layers: Positive = 5
    num_taps: Positive = 5
    block_size: Annotated[int, Meta(ge=2)] = 16
    num_anchors: Positive = 512
    loss: Literal["decay", "dpace"] = "decay"
    loss_decay: float = -1.0
    dpace_alpha: Annotated[float, Meta(gt=0, le=1)] = 0.5
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
