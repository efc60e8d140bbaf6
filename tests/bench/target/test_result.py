"""Ratios of a target's rates: each round's own, beside what they are rightly compared with."""

from __future__ import annotations

from specd.bench.target.result import TargetRatio, TargetRow, Way, ratios


def made(way: Way, tokens: int, share: int, *by_round: float) -> TargetRow:
    middle = sorted(by_round)[len(by_round) // 2]
    return TargetRow(
        way=way,
        tokens=tokens,
        share=share,
        by_round=by_round,
        tokens_per_s=middle,
        low=min(by_round),
        high=max(by_round),
    )


def test_every_round_is_compared_with_itself() -> None:
    rows = [
        made("bare", 3072, 1, 50.0, 100.0, 60.0),
        made("bare", 3072, 2, 100.0, 200.0, 100.0),
        made("beside", 3072, 1, 90.0, 160.0, 90.0),
        made("daemon", 3072, 2, 98.0, 190.0, 99.0),
        made("bare", 512, 16, 200.0, 400.0, 200.0),
    ]
    found = {(ratio.name, ratio.tokens): ratio for ratio in ratios(rows)}
    assert found["daemon / bare, 2 a forward", 3072] == TargetRatio(
        name="daemon / bare, 2 a forward", tokens=3072, value=0.98, low=0.95, high=0.99, bar=0.97
    )
    assert found["beside / bare, 1 a forward", 3072].value == 1.6
    single = found["bare: 1 / 2 a forward", 3072]
    assert (single.value, single.low, single.high, single.bar) == (0.5, 0.5, 0.6, 0.85)
    assert found["beside: 1 / bare 16 × 512", 3072].value == 0.45
    assert found["bare: 1 / bare 16 × 512", 3072].bar is None
    assert all(ratio.tokens == 3072 for ratio in found.values())


def test_a_lone_row_has_no_ratio() -> None:
    assert list(ratios([made("bare", 512, 1, 1.0)])) == []
    assert list(ratios([made("daemon", 512, 1, 1.0)])) == []
