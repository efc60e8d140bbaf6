"""DFlash2 as the registry knows it."""

from __future__ import annotations

from typing import Any, ClassVar

from specd.config.settings import Config
from specd.drafts.backbone.form import Form
from specd.drafts.backbone.method import BlockMethod
from specd.drafts.backbone.objective import BlockObjective
from specd.drafts.backbone.workload import workload
from specd.drafts.base import Workload
from specd.drafts.dflash2.network import DFlash2Shape
from specd.drafts.dflash2.objective import DFLASH2, DFlash2
from specd.drafts.dflash2.settings import DFlash2Config
from specd.errors import ConfigError
from specd.protocol.batch import Batch


class DFlash2Method(BlockMethod):
    """See `specd.drafts.base.Method`."""

    trains: ClassVar[type[BlockObjective]] = DFlash2
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

    @staticmethod
    def workload(objective: DFlash2, batch: Batch) -> Workload:
        """See Method.workload. Of convolutions their kernels are counted, which are products."""
        work, shape = workload(objective, batch), objective.draft.shape
        assert isinstance(shape, DFlash2Shape)
        kernels = 2 * 2 * shape.conv_kernel_size * (shape.hidden_size // shape.conv_group_size)
        own = {
            "convolution kernels": 3 * shape.num_layers * 2.0 * work.rows * shape.hidden_size * kernels,
            "selector's states": 3 * 2.0 * work.predictions * shape.hidden_size * shape.selector_rank,
            "selector": 3 * 2.0 * work.predictions * shape.selector_top_k * shape.selector_rank,
        }
        return work._replace(flops=work.flops | own)
