"""Rows: figures of what was timed, bounds, and `origin` beside them."""

from __future__ import annotations

import msgspec
import pytest

from pipeline_results import row
from specd.bench.pipeline.bare_target import Bare
from specd.bench.pipeline.defaults import defaults
from specd.bench.pipeline.rows import row_of, settle
from specd.bench.pipeline.step import Clocked
from specd.metrics import Stats

TINY = "synthetic:hidden=32,layers=8,vocab=64"
SETTINGS = defaults(True, 1, TINY, {})
BARE = Bare(batch_ms={"fixed": {1: 12.0, 2: 8.0}}, batch_spread_ms={}, short_tokens_per_s={}, long_tokens_per_s={})


def test_a_row_has_the_figures_of_its_iterations() -> None:
    stats = Stats(batches=4, target_wait_s=0.01, wire_wait_s=0.002, forward_s=0.02, nbytes=800)
    clocked = Clocked(seconds=(0.01, 0.02, 0.01, 0.02), samples=8, tokens=512, stats=stats)
    found = row_of("disaggregated", "fixed", 2, "shm", 3, clocked)
    assert (found.iterations, found.iteration_ms, found.p50_ms) == (4, 15.0, 15.0)
    assert (found.samples_per_s, found.tokens_per_s) == (133.333, 8533.3)
    assert found.gpu_seconds_per_sample == pytest.approx(3 * 0.06 / 8, abs=1e-6)
    assert (found.target_wait_ms, found.wire_wait_ms, found.trainer_ms, found.forward_ms) == (2.5, 0.5, 12.0, 5.0)
    assert found.bytes_per_sample == 100


def test_without_a_subscriber_there_are_no_waits() -> None:
    found = row_of("co-located", "fixed", 0, "inproc", 2, Clocked(seconds=(0.01,), samples=1, tokens=64), parallel=2)
    assert (found.parallel, found.samples_per_s, found.trainer_ms) == (2, 200.0, None)


def test_a_bound_is_the_slower_side_and_their_sum_on_one_device() -> None:
    rows = [row("disaggregated", 0, 30.0), row("co-located", 0, 25.0)]
    (apart, together) = settle(rows, SETTINGS, BARE, {"fixed": 10.0})
    assert (apart.bound_ms, apart.efficiency) == (12.0, 0.4)
    assert together.bound_ms is None
    shared = msgspec.structs.replace(SETTINGS, devices=("cuda:0",), trainer="cuda:0")
    assert settle(rows, shared, BARE, {"fixed": 10.0})[0].bound_ms == 22.0
    two = msgspec.structs.replace(SETTINGS, devices=("cpu", "cpu"))
    assert settle(rows, two, BARE, {"fixed": 10.0})[0].bound_ms == 10.0
    assert settle(rows, SETTINGS, None, {})[0].bound_ms is None


def test_co_location_stands_beside_every_row_of_its_lengths() -> None:
    """The count of whoever asks whether two servers help a trainer, and that of whoever pays for three GPUs."""
    rows = [
        row("disaggregated", 2, 111.0, devices=3), row("co-located", 0, 300.0), row("co-located", 2, 263.0),
        row("co-located data-parallel", 0, 263.0, devices=3, parallel=3), row("disaggregated", 2, 9.0, "log-normal"),
    ]  # fmt: skip
    apart, *_, other = settle(rows, SETTINGS, None, {})
    assert (apart.over_one, apart.over_as_many) == (2.369, 0.79)
    assert (other.over_one, other.over_as_many) == (None, None)


def test_ranks_of_one_training_need_as_many_forwards_an_iteration() -> None:
    rows = [row("disaggregated", 2, 50.0, devices=6, parallel=4)]
    four = msgspec.structs.replace(SETTINGS, devices=("cpu", "cpu"), trainers=4)
    assert settle(rows, four, BARE, {"fixed": 10.0})[0].bound_ms in {24.0, 16.0}, "12 or 8 ms, four times, of two"
    assert settle(rows, four, BARE, {"fixed": 30.0})[0].bound_ms == 30.0


def test_origin_stands_beside_rows_of_the_same_lengths() -> None:
    """At depth 0 without overlap, else at its best."""
    rows = [
        row("disaggregated", 0, 40.0), row("disaggregated", 2, 20.0), row("co-located", 0, 25.0),
        row("origin", 0, 44.0), row("origin", 1, 30.0), row("disaggregated", 2, 20.0, "log-normal"),
    ]  # fmt: skip
    found = [one.over_origin for one in settle(rows, SETTINGS, None, {})]
    assert found == [1.1, 1.5, 1.2, None, None, None]
