"""Settings of a DSpark draft."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from specd.config.settings import Positive
from specd.drafts.backbone.settings import BlockConfig

Weight = Annotated[float, Meta(ge=0)]


class DSparkConfig(BlockConfig, kw_only=True, frozen=True):
    """The DSpark draft.

    init: directory of a draft or a run whose weights training begins with; those of a DFlash become its backbone.
    block_size: tokens a block, each of which guesses the one behind it: so many guesses. loss_decay: γ of the position
    weights, 0 for none. markov_rank: of the scores of two tokens in a row. ce_weight: of the cross-entropy on the
    text's tokens. l1_weight: of the L1 distance from the target's distribution, which is twice the total variation.
    confidence_weight: of the confidence head's loss.
    """

    block_size: Annotated[int, Meta(ge=2)] = 7
    loss: Literal["decay"] = "decay"
    loss_decay: float = 4.0
    sliding_causal: bool = False
    markov_rank: Positive = 256
    ce_weight: Weight = 0.1
    l1_weight: Weight = 0.9
    confidence_weight: Weight = 1.0
