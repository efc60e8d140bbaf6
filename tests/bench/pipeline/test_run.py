"""The pipeline benchmark with tiny shapes: its rows and bounds, and what is kept when a phase fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from specd.bench.pipeline import processes
from specd.bench.pipeline.defaults import defaults
from specd.bench.pipeline.result import PipelineResult
from specd.bench.pipeline.run import run
from specd.bench.pipeline.settings import Settings
from specd.cli.main import run as command
from specd.errors import DaemonError, TransportError
from specd.plan.balance import Balance, balance

TINY = "synthetic:hidden=32,layers=8,vocab=64"
SETTINGS = defaults(True, 1, TINY, {})


@pytest.fixture(scope="module")
def result() -> PipelineResult:
    """A run of a target and a draft that sleep."""
    asked = {"draft": "synthetic:ms=15,params=64", "steps": 6}
    return run(defaults(True, 1, f"{TINY},ms=10", asked))


def test_every_way_has_its_row(result: PipelineResult) -> None:
    assert [(row.mode, row.depth, row.transport, row.devices) for row in result.rows] == [
        ("disaggregated", 0, "shm", 2),
        ("disaggregated", 2, "shm", 2),
        ("origin", 0, "gloo", 2),
        ("origin", 1, "gloo", 2),
        ("co-located", 0, "inproc", 1),
        ("co-located data-parallel", 0, "inproc", 2),
    ]
    assert result.skipped == {}
    assert set(result.target_ms) == set(result.draft_ms) == set(result.target_spread_ms) == {"fixed"}
    assert {"cpu", "torch", "commit"} <= set(result.machine)


def test_bounds_and_costs_follow_from_what_was_measured(result: PipelineResult) -> None:
    target, draft = result.target_ms["fixed"][1], result.draft_ms["fixed"]
    assert target >= 10
    assert draft >= 15
    for row in result.rows:
        assert row.iterations == 6
        assert row.p10_ms <= row.p25_ms <= row.p50_ms <= row.p75_ms <= row.p90_ms
        samples = 4 * row.parallel
        assert row.samples_per_s == pytest.approx(samples / row.iteration_ms * 1e3, rel=1e-3)
        assert row.gpu_seconds_per_sample == pytest.approx(row.devices * row.iteration_ms / 1e3 / samples, rel=1e-3)
        assert (row.bound_ms is None) is (row.mode != "disaggregated")
        if row.bound_ms is not None:
            assert row.bound_ms == max(target, draft)
            assert row.efficiency == pytest.approx(row.bound_ms / row.iteration_ms, abs=1e-3)
            assert (row.daemon_memory_bytes or 0) > 1 << 20
        assert (row.trainer_memory_bytes is None) is (row.mode == "origin")
        assert (row.over_origin is None) is (row.mode == "origin")
    alone, together = (row.samples_per_s for row in result.rows[-2:])
    assert [row.over_one for row in result.rows] == pytest.approx(
        [row.samples_per_s / alone for row in result.rows], abs=1e-3
    )
    assert [row.over_as_many for row in result.rows] == pytest.approx(
        [row.samples_per_s / (together if row.devices == 2 else alone) for row in result.rows], abs=1e-3
    )


def test_waits_are_attributed(result: PipelineResult) -> None:
    on_demand, deep = result.rows[:2]
    for row in (on_demand, deep, *result.rows[4:]):
        assert row.target_wait_ms is not None
        assert row.wire_wait_ms is not None
        assert row.trainer_ms is not None
        parts = row.target_wait_ms + row.wire_wait_ms + row.trainer_ms
        assert parts == pytest.approx(row.iteration_ms, abs=0.01)
    assert (on_demand.target_wait_ms or 0) > 9
    assert (on_demand.forward_ms or 0) >= 10
    assert deep.iteration_ms < on_demand.iteration_ms
    assert on_demand.bytes_per_sample == 64 * 3 * 32 * 4
    assert result.rows[2].bytes_per_sample == 64 * (3 * 32 * 2 + 24)


def test_rates_stand_beside_the_bare_target(result: PipelineResult) -> None:
    assert [(rate.composition, rate.depth, rate.merged, rate.bar) for rate in result.rates] == [
        ("8×32", 2, 1, 0.95),
        ("1×256", 2, 1, 0.95),
        ("1×32", 16, 8, 0.8),
    ]
    for rate in result.rates:
        assert rate.ratio == pytest.approx(rate.tokens_per_s / rate.reference_tokens_per_s, abs=1e-3)
        assert 0 < rate.p25_tokens_per_s <= rate.p75_tokens_per_s
    # Eight samples share a forward: alone, each would take as long as all of them together.
    assert result.rates[2].tokens_per_s > 2.5 * 32 / 0.010


def test_a_plan_reads_it(result: PipelineResult, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "pipeline.json"
    path.write_bytes(msgspec.json.encode(result))
    assert msgspec.json.decode(path.read_bytes(), type=PipelineResult).rows == result.rows
    assert command(["plan", "--from", str(path), "--json"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=Balance).work == result.work
    assert result.work is not None
    assert (result.work.batch_tokens, result.work.tokens_per_sample) == (256, 64)
    assert balance(result.work).starves == "target"
    assert result.work.bytes_per_token == 3 * 32 * 4


@pytest.fixture(scope="module")
def broken() -> tuple[PipelineResult, list[PipelineResult]]:
    """A run with one sample a batch in which the daemons' transport fails half-way, the serving process cannot be
    joined and the last one of two dies; and all that was kept on the way."""
    real, real_daemon = processes.child, Settings.daemon

    @contextmanager
    def failing(module: str, job: Any) -> Iterator[processes.Child]:
        if getattr(job, "rank", 0) == 1:
            job = msgspec.structs.replace(job, device="cuda:99")
        with real(module, job) as made:
            yield made

    def unjoined(*_: Any) -> Any:
        raise TransportError("no group")

    def daemon_of(self: Settings, device: str, slots: int, sessions: int = 1) -> Any:
        return msgspec.structs.replace(real_daemon(self, device, slots, sessions), transports=("shm",))

    settings = msgspec.structs.replace(
        SETTINGS, model=f"{TINY},ms=5", draft="synthetic:ms=2,params=64", depths=(0,), steps=3, warmup=1,
        sample_tokens=256, transports=("shm", "pigeon"), merge_depth=8,
    )  # fmt: skip
    kept: list[PipelineResult] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specd.bench.pipeline.apart.CONNECT_S", 2.0)
        patch.setattr("specd.bench.pipeline.ranks.child", failing)
        patch.setattr("specd.bench.pipeline.origin_protocol.joined", unjoined)
        patch.setattr(Settings, "daemon", daemon_of)
        return run(settings, keep=kept.append), kept


def test_what_fails_is_left_out_and_all_else_is_kept(broken: tuple[PipelineResult, list[PipelineResult]]) -> None:
    result, kept = broken
    assert [(row.mode, row.transport) for row in result.rows] == [("disaggregated", "shm")]
    assert "pigeon" in result.skipped["disaggregated over pigeon"]
    assert result.skipped["origin"] == "no group"
    assert "co-located" in result.skipped
    assert len(result.rates) == 3
    assert result.rows[0].bound_ms is not None
    assert [len(one.rows) for one in kept] == sorted(len(one.rows) for one in kept)
    assert kept[-1].rows == result.rows
    assert kept[0].work is None


def test_a_plan_reads_batches_of_one_sample(broken: tuple[PipelineResult, list[PipelineResult]]) -> None:
    work = broken[0].work
    assert work is not None
    assert (work.batch_tokens, work.tokens_per_sample) == (256, 256)
    assert balance(work).bytes_per_sample == 256 * 3 * 32 * 4


def test_what_cannot_begin_is_an_error() -> None:
    with pytest.raises(DaemonError, match="expected hidden ≥ 1"):
        run(msgspec.structs.replace(SETTINGS, model="synthetic:hidden=0"))
