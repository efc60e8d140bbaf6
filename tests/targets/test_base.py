"""What backends share: the layers that a hybrid target is tapped at, and the checks of a job."""

from __future__ import annotations

from specd.drafts.taps import spread_taps
from specd.targets.base import tap_layers


def test_hybrid_targets_are_tapped_at_full_attention_only() -> None:
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 4
    assert tap_layers(kinds) == (3, 7, 11)
    assert spread_taps(16, 2, tap_layers(kinds)) == (3, 11)
    assert tap_layers(["full_attention", "sliding_attention"]) == ()
    assert tap_layers([]) == ()
