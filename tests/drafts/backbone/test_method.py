"""Block drafts as the registry knows it: the suite for drafts, and what it captures."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from drafts import (
    CONFIG,
    CONTRACT,
)
from specd.drafts.dflash.method import DFlashMethod
from specd.errors import ConfigError
from specd.protocol.capture import CaptureSpec


def test_capture_spec_follows_the_target() -> None:
    assert DFlashMethod.capture(CONFIG, CONTRACT) == CaptureSpec(taps=(1, 3, 5), dtype="float32")
    hybrid = msgspec.structs.replace(CONTRACT, tap_layers=(0, 2, 4, 5))
    assert DFlashMethod.capture(CONFIG, hybrid).taps == (0, 4, 5)
    quantised = msgspec.structs.replace(CONTRACT, dtype="float8_e4m3fn")
    assert DFlashMethod.capture(CONFIG, quantised).dtype == "bfloat16"
    with pytest.raises(ConfigError, match="ask for fewer"):
        DFlashMethod.capture(msgspec.structs.replace(CONFIG, num_taps=9), CONTRACT)
    with pytest.raises(ConfigError, match=r"draft\.mask_token_id=97: expected a token of tiny.* has 97; give one"):
        DFlashMethod.capture(msgspec.structs.replace(CONFIG, mask_token_id=97), CONTRACT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_decay": -3.0}, "loss_decay -3"),
        ({"loss_decay": 4.0}, r"draft\.loss_decay=4\.0: it is of draft\.loss=decay, and this draft's is dpace"),
        ({"loss": "decay", "dpace_alpha": 0.3}, r"draft\.dpace_alpha=0\.3: it is of draft\.loss=dpace"),
        ({"num_heads": 6, "num_kv_heads": 4}, "num_heads 6 is not a multiple of num_kv_heads 4"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"sliding_window": 3}, "sliding_window 3 is shorter than a block of 4"),
    ],
)
def test_settings_that_no_target_can_suit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DFlashMethod.check(msgspec.structs.replace(CONFIG, **changes), "tiny")


def test_sizes_that_are_the_targets_are_not_judged_without_it() -> None:
    for changes in ({"num_kv_heads": 3}, {"num_heads": 6}, {"sliding_window": 4}):
        DFlashMethod.check(msgspec.structs.replace(CONFIG, **changes), "tiny")
