"""DFlash as the registry knows it: the suite for drafts, and what it captures."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from specd.config.settings import Config
from specd.drafts.base import Method
from specd.drafts.dflash.method import DFlashMethod
from specd.drafts.dflash.settings import DFlashConfig
from specd.drafts.suite import DraftConformance


class TestDFlash(DraftConformance):
    method: ClassVar[type[Method]] = DFlashMethod
    settings: ClassVar[Config] = DFlashConfig(
        num_layers=2, num_taps=3, block_size=4, num_anchors=5, loss_chunk=7, mask_token_id=3
    )


class TestDFlashWithDpace(TestDFlash):
    settings: ClassVar[Config] = msgspec.structs.replace(TestDFlash.settings, loss="dpace")
