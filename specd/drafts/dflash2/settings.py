"""Settings of a DFlash2 draft."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from specd.config.settings import Positive
from specd.drafts.backbone.settings import BlockConfig


class DFlash2Config(BlockConfig, kw_only=True, frozen=True):
    """The DFlash2 draft.

    init: directory of a draft or a run whose weights training begins with, also a DFlash draft, which becomes its
    backbone. conv_kernel_size: tokens of a block, itself included, that a convolution reads. conv_group_size: adjacent
    channels that share a kernel. selector_top_k: tokens of each place that the selector chooses from. selector_rank:
    inner size of its scores of two tokens in a row. selector_weight: of the selector's loss beside the head's.
    """

    block_size: Annotated[int, Meta(ge=2)] = 8
    loss: Literal["decay", "dpace"] = "dpace"
    sliding_causal: bool = False
    conv_kernel_size: Positive = 2
    conv_group_size: Positive = 16
    selector_rank: Positive = 256
    selector_top_k: Positive = 16
    selector_weight: Annotated[float, Meta(ge=0)] = 1.0
