"""A target without a daemon: the same batches as rows time, grouped as a daemon merges them."""

from __future__ import annotations

import pytest

from specd.bench.pipeline.bare_target import grouped, measure, run
from specd.bench.pipeline.defaults import defaults
from specd.bench.pipeline.settings import Settings, batches
from specd.config.settings import TargetConfig
from specd.protocol.capture import CaptureSpec
from specd.targets.registry import load_target

TINY = "synthetic:hidden=32,layers=8,vocab=64"
SETTINGS = defaults(True, 1, TINY, {})


@pytest.mark.parametrize("steps", [10, 20])
def test_a_bare_target_runs_batches_as_long_as_those_that_rows_time(steps: int) -> None:
    settings = Settings(model=TINY, steps=steps)
    row = batches(settings, "log-normal", 64, settings.warmup + steps, 1)[settings.warmup :]
    alone = batches(settings, "log-normal", 64, steps, 2, settings.warmup)
    assert [batch.lengths.tolist() for batch in alone] == [batch.lengths.tolist() for batch in row]
    for most in (1, 2, 3):
        groups = grouped(settings, alone, most)
        assert max(map(len, groups)) == most
        assert [batch.index for group in groups for batch in group] == [*range(steps)] * most
        for group in groups:
            assert len(group) == 1 or sum(batch.num_tokens for batch in group) <= settings.forward_tokens


def test_every_forward_after_warm_up_is_timed() -> None:
    target = load_target(TargetConfig(model=f"{TINY},ms=2"))
    drawn = batches(SETTINGS, "fixed", 64, 3, 1)
    seconds = run(target, CaptureSpec(taps=(1,), dtype="float32"), [drawn[:2], drawn[2:], drawn[:1]], 1)
    assert len(seconds) == 2
    assert sum(seconds) >= 0.004


def test_times_are_of_one_batch_by_how_many_share_a_forward() -> None:
    settings = Settings(
        model=TINY, steps=2, warmup=1, depths=(0, 2), lengths=("fixed",), batch_tokens=64, sample_tokens=64, short=16,
        many=2, forward_tokens=128,
    )  # fmt: skip
    bare = measure(load_target(TargetConfig(model=f"{TINY},ms=4")), CaptureSpec(taps=(1,), dtype="float32"), settings)
    assert bare.batch_ms["fixed"].keys() == bare.batch_spread_ms["fixed"].keys() == {1, 2}
    assert bare.batch_ms["fixed"][1] >= 4
    assert bare.batch_ms["fixed"][2] >= 2
    assert bare.short_tokens_per_s.keys() == {1, 4}
    assert bare.long_tokens_per_s.keys() == {1, 2}
