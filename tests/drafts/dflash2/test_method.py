"""DFlash2 as the registry knows it: the suite for drafts, and what is refused."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
import pytest

from specd.config.settings import Config
from specd.drafts.base import Method
from specd.drafts.dflash2.method import DFlash2Method
from specd.drafts.dflash2.settings import DFlash2Config
from specd.drafts.suite import DraftConformance
from specd.errors import ConfigError

TINY = DFlash2Config(
    num_layers=2, num_taps=3, block_size=5, num_anchors=5, loss_chunk=7, mask_token_id=3, conv_group_size=8,
    selector_rank=6, selector_top_k=5,
)  # fmt: skip


class TestDFlash2(DraftConformance):
    method: ClassVar[type[Method]] = DFlash2Method
    settings: ClassVar[Config] = TINY


class TestDFlash2WithDecay(TestDFlash2):
    settings: ClassVar[Config] = msgspec.structs.replace(TINY, loss="decay", conv_kernel_size=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_kernel_size": 6}, r"draft\.conv_kernel_size=6: expected no more than the 5 tokens"),
        ({"sliding_window": 9, "sliding_causal": True}, r"draft\.sliding_causal=true: expected false"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DFlash2Method.check(msgspec.structs.replace(TINY, **changes), "tiny")
