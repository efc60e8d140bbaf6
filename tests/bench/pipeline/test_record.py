"""What is kept of a run: rows as they come, phases that fail, and the rates that a plan takes."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline_results import row
from specd.bench.pipeline.bare_target import Bare
from specd.bench.pipeline.defaults import defaults
from specd.bench.pipeline.rates import Fed
from specd.bench.pipeline.record import Record, Timeline
from specd.bench.pipeline.result import PipelineResult
from specd.bench.pipeline.step import Clocked
from specd.metrics import Stats
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import TargetContract

TINY = "synthetic:hidden=32,layers=8,vocab=64"
SETTINGS = defaults(True, 1, TINY, {})
CONTRACT = TargetContract(
    model="t", model_type="synthetic", hidden_size=32, num_layers=8, vocab_size=64, dtype="float32", weights="0"
)


@pytest.fixture
def kept() -> list[PipelineResult]:
    return []


@pytest.fixture
def record(kept: list[PipelineResult]) -> Record:
    spec = CaptureSpec(taps=(1, 4), dtype="float32")
    return Record(SETTINGS, {}, CONTRACT, spec, Timeline(lambda line: None), kept.append)


def test_everything_is_kept_as_it_comes(record: Record, kept: list[PipelineResult]) -> None:
    record.add(row("disaggregated", 0, 40.0))
    with record.phase("co-located"):
        record.add(row("co-located", 0, 25.0))
        raise RuntimeError("out of memory")
    assert [len(result.rows) for result in kept] == [1, 2, 2]
    assert record.skipped == kept[-1].skipped == {"co-located": "out of memory"}
    assert kept[-1].target["hidden_size"] == 32


def test_a_reason_is_never_empty(record: Record) -> None:
    with record.phase("one"):
        raise KeyError
    assert record.skipped == {"one": "KeyError()"}


def test_what_begins_is_shown_and_noted() -> None:
    shown: list[str] = []
    timeline = Timeline(shown.append)
    timeline("warming up")
    assert shown == ["warming up"]
    assert timeline.began_s.keys() == {"warming up"}
    assert 0 <= timeline.began_s["warming up"] <= timeline.elapsed_s


def clocked(seconds: float, **stats: Any) -> Clocked:
    """Two batches of four samples of 64 tokens."""
    return Clocked(seconds=(seconds, seconds), samples=8, tokens=512, stats=Stats(**stats))


def test_a_plan_takes_the_rates_of_the_first_lengths(record: Record) -> None:
    assert record.result().work is None
    record.draft_ms = {"fixed": 20.0}
    record.clocked = {"fixed": [clocked(0.1, nbytes=3_000, fetch_s=1e-6), clocked(0.1, nbytes=1_000, fetch_s=1e-6)]}
    assert record.result().work is None, "nothing says how fast the target is"
    record.fed = {"long": Fed(composition="1×256", depth=2, merged=1, tokens_per_s=5_000.0, spread=(0.0, 0.0))}
    work = record.result().work
    assert work is not None
    assert (work.target_tokens_per_s, work.colocated_target_tokens_per_s) == (5_000, 0)
    record.bare = Bare(
        batch_ms={"fixed": {1: 32.0, 2: 16.0}}, batch_spread_ms={}, short_tokens_per_s={}, long_tokens_per_s={}
    )
    record.fed = {}
    work = record.result().work
    assert work is not None
    assert (work.target_tokens_per_s, work.colocated_target_tokens_per_s) == (16_000, 8_000)
    assert (work.draft_tokens_per_s, work.batch_tokens, work.tokens_per_sample) == (12_800, 256, 64)
    assert work.bytes_per_token == 2 * 32 * 4
    assert (work.colocated_tokens_per_s, work.efficiency) == ({}, 1.0)
    record.rows = [
        row("disaggregated", 0, 60.0), row("disaggregated", 4, 25.0), row("disaggregated", 2, 30.0),
        row("co-located", 0, 9.0, "log-normal"), row("origin", 1, 10.0), row("co-located", 0, 40.0),
        row("co-located", 2, 32.0), row("co-located data-parallel", 2, 40.0, parallel=2),
    ]  # fmt: skip
    work = record.result().work
    assert work is not None
    assert work.colocated_tokens_per_s == {1: 2_000, 2: 3_200}
    assert (work.efficiency, work.depth) == (0.8, 4)  # of a draft that takes 20 ms, its target 16
    assert work.wire_gb_per_s == pytest.approx(2.0)
