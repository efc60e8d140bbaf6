"""Rates to a null trainer: whole forwards a block, and the reference that a daemon could have merged to."""

from __future__ import annotations

import msgspec

from specd.bench.pipeline import rates
from specd.bench.pipeline.bare_target import Bare
from specd.bench.pipeline.defaults import defaults

TINY = "synthetic:hidden=32,layers=8,vocab=64"
SETTINGS = defaults(True, 1, TINY, {})


def test_a_rate_stands_beside_the_best_it_may_have_merged_to() -> None:
    def fed(composition: str, depth: int, merged: int, rate: float) -> rates.Fed:
        return rates.Fed(composition=composition, depth=depth, merged=merged, tokens_per_s=rate, spread=(rate, rate))

    found = {
        "short": fed("16×512", 2, 1, 90.0),
        "long": fed("1×3072", 4, 2, 60.0),
        "singles": fed("1×512", 32, 16, 81.0),
    }
    bare = Bare(
        batch_ms={}, batch_spread_ms={}, short_tokens_per_s={1: 100.0}, long_tokens_per_s={1: 50.0, 2: 75.0, 4: 99.0}
    )
    short, long, singles = rates.compare(SETTINGS, found, bare)
    assert (short.reference, short.ratio) == ("bare target", 0.9)
    assert (long.reference, long.ratio) == ("bare target, 2 a forward (the best)", 0.8)
    assert long.bare_tokens_per_s == {1: 50.0, 2: 75.0}
    assert (singles.reference, singles.ratio) == ("daemon, 16×512", 0.9)
    exact = msgspec.structs.replace(SETTINGS, target={"exact": True})
    assert [rate.composition for rate in rates.compare(exact, found, bare)] == ["16×512", "1×3072"]


def test_blocks_are_whole_forwards() -> None:
    assert [len(block) for block in rates._blocks([1.0] * 20, 2)] == [4] * 5
    assert [len(block) for block in rates._blocks([1.0] * 384, 16)] == [48] * 8
    assert [len(block) for block in rates._blocks([1.0] * 9, 2)] == [2] * 4
    assert [len(block) for block in rates._blocks([1.0] * 3, 8)] == [3]
