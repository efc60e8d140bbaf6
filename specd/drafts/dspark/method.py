"""DSpark as the registry knows it."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from specd.config.settings import Config
from specd.drafts.backbone.form import Form
from specd.drafts.backbone.method import BlockMethod
from specd.drafts.backbone.objective import BlockObjective
from specd.drafts.backbone.workload import workload
from specd.drafts.base import Workload
from specd.drafts.dspark.network import DSparkShape
from specd.drafts.dspark.objective import DSPARK, DSpark
from specd.drafts.dspark.settings import DSparkConfig
from specd.protocol.batch import Batch


class DSparkMethod(BlockMethod):
    """See `specd.drafts.base.Method`."""

    trains: ClassVar[type[BlockObjective]] = DSpark
    form: ClassVar[Form] = DSPARK
    title: ClassVar[str] = "DSpark (DeepSeek)"
    settings: ClassVar[type[Config]] = DSparkConfig
    architectures: ClassVar[tuple[str, ...]] = DSPARK.architectures

    @staticmethod
    def workload(objective: DSpark, batch: Batch) -> Workload:
        """See Method.workload. A teacher counts once, however many chunks it is needed in."""
        work, shape = workload(objective, batch), objective.draft.shape
        assert isinstance(shape, DSparkShape)
        teachers = np.unique(objective.draw(batch).before).size
        own = {
            "teachers": 2.0 * teachers * shape.hidden_size * shape.vocab_size,
            "markov head": 3 * 2.0 * work.predictions * shape.markov_rank * shape.vocab_size,
            "confidence head": 3 * 2.0 * work.predictions * (shape.hidden_size + shape.markov_rank),
        }
        return work._replace(flops=work.flops | own)
