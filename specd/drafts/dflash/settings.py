"""Settings of a DFlash draft."""

from __future__ import annotations

from typing import Literal

from specd.drafts.backbone.settings import BlockConfig


class DFlashConfig(BlockConfig, kw_only=True, frozen=True):
    """The DFlash draft (arXiv 2602.06036), which is the backbone alone."""

    loss: Literal["decay", "dpace"] = "dpace"
