"""DFlash2 as the registry knows it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from specd.config.settings import Config
from specd.drafts.backbone.form import Form
from specd.drafts.backbone.method import BlockMethod
from specd.drafts.base import TargetParts, Tuning
from specd.drafts.dflash2.objective import DFLASH2, DFlash2
from specd.drafts.dflash2.settings import DFlash2Config
from specd.errors import ConfigError


class DFlash2Method(BlockMethod):
    """See `specd.drafts.base.Method`."""

    form: ClassVar[Form] = DFLASH2
    title: ClassVar[str] = "DFlash2 (z-lab)"
    settings: ClassVar[type[Config]] = DFlash2Config
    architectures: ClassVar[tuple[str, ...]] = DFLASH2.architectures

    @classmethod
    def check(cls, settings: Any, target: str) -> None:
        """See BlockMethod.check."""
        super().check(settings, target)
        if settings.conv_kernel_size > settings.block_size:
            raise ConfigError(
                f"draft.conv_kernel_size={settings.conv_kernel_size}: expected no more than the "
                f"{settings.block_size} tokens of a block (draft.block_size)"
            )
        if settings.sliding_window and settings.sliding_causal:
            raise ConfigError(
                "draft.sliding_causal=true: expected false, as DFlash2 drafts are published and served; leave it out"
            )

    @staticmethod
    def objective(
        settings: DFlash2Config,
        target: TargetParts,
        device: str | torch.device,
        dtype: torch.dtype,
        seed: int = 0,
        tuning: Tuning | None = None,
    ) -> DFlash2:
        """The draft that is trained."""
        return DFlash2(settings, target, device, dtype, seed, tuning)
