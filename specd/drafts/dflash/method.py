"""DFlash as the registry knows it."""

from __future__ import annotations

from typing import ClassVar

import torch

from specd.config.settings import Config
from specd.drafts.backbone.form import DFLASH, Form
from specd.drafts.backbone.method import BlockMethod
from specd.drafts.base import TargetParts, Tuning
from specd.drafts.dflash.objective import DFlash
from specd.drafts.dflash.settings import DFlashConfig


class DFlashMethod(BlockMethod):
    """See `specd.drafts.base.Method`."""

    form: ClassVar[Form] = DFLASH
    title: ClassVar[str] = "DFlash (arXiv 2602.06036)"
    settings: ClassVar[type[Config]] = DFlashConfig
    architectures: ClassVar[tuple[str, ...]] = DFLASH.architectures

    @staticmethod
    def objective(
        settings: DFlashConfig,
        target: TargetParts,
        device: str | torch.device,
        dtype: torch.dtype,
        seed: int = 0,
        tuning: Tuning | None = None,
    ) -> DFlash:
        """The draft that is trained."""
        return DFlash(settings, target, device, dtype, seed, tuning)
