"""DFlash as the registry knows it."""

from __future__ import annotations

from typing import ClassVar

from specd.config.settings import Config
from specd.drafts.backbone.form import DFLASH, Form
from specd.drafts.backbone.method import BlockMethod
from specd.drafts.backbone.objective import BlockObjective
from specd.drafts.dflash.objective import DFlash
from specd.drafts.dflash.settings import DFlashConfig


class DFlashMethod(BlockMethod):
    """See `specd.drafts.base.Method`."""

    trains: ClassVar[type[BlockObjective]] = DFlash
    form: ClassVar[Form] = DFLASH
    title: ClassVar[str] = "DFlash (arXiv 2602.06036)"
    settings: ClassVar[type[Config]] = DFlashConfig
    architectures: ClassVar[tuple[str, ...]] = DFLASH.architectures
