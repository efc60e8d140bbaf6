"""The pipeline benchmark with tiny shapes: its rows and bounds, the emulated protocol's bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from typer.testing import CliRunner

from specd.bench.pipeline import bare_target as pipeline_bare
from specd.bench.pipeline import chart as pipeline_chart
from specd.bench.pipeline import origin_protocol as seed
from specd.bench.pipeline import processes, rates
from specd.bench.pipeline import table as pipeline_table
from specd.bench.pipeline.defaults import defaults
from specd.bench.pipeline.processes import child, daemon
from specd.bench.pipeline.result import Result
from specd.bench.pipeline.run import run
from specd.bench.pipeline.settings import Settings, batches
from specd.cli.main import app
from specd.cli.main import run as command
from specd.config.settings import TargetConfig
from specd.errors import DaemonError, TransportError
from specd.plan import balance
from specd.protocol.capture import CaptureSpec
from specd.targets.registry import load_target

TINY = "synthetic:hidden=32,layers=8,vocab=64"
SETTINGS = defaults(True, 1, TINY, {})


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the command printed, and the chart it drew, for a target and a draft that sleep."""
    chart = tmp_path_factory.mktemp("chart") / "pipeline.html"
    options = ["--model", f"{TINY},ms=10", "--draft", "synthetic:ms=15,params=64", "--steps", "6"]
    options += ["--save", str(chart.with_name("kept.json"))]
    done = CliRunner().invoke(app, ["bench", "pipeline", "--quick", *options, "--json", "--chart", str(chart)])
    assert done.exit_code == 0, done.output
    return done.stdout, chart


@pytest.fixture(scope="module")
def result(printed: tuple[str, Path]) -> Result:
    return msgspec.json.decode(printed[0][: printed[0].rindex("}") + 1], type=Result)


def test_every_way_has_its_row(result: Result) -> None:
    assert [(row.mode, row.depth, row.transport, row.devices) for row in result.rows] == [
        ("disaggregated", 0, "shm", 2),
        ("disaggregated", 2, "shm", 2),
        ("seed protocol", 0, "gloo", 2),
        ("seed protocol", 1, "gloo", 2),
        ("co-located", 0, "inproc", 1),
        ("co-located data-parallel", 0, "inproc", 2),
    ]
    assert result.skipped == {}
    assert set(result.target_ms) == set(result.draft_ms) == set(result.target_spread_ms) == {"fixed"}
    assert {"cpu", "torch", "commit"} <= set(result.machine)


def test_bounds_and_costs_follow_from_what_was_measured(result: Result) -> None:
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
        assert (row.trainer_memory_bytes is None) is (row.mode == "seed protocol")
        assert (row.over_seed is None) is (row.mode == "seed protocol")


def test_waits_are_attributed(result: Result) -> None:
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


def test_rates_stand_beside_the_bare_target(result: Result) -> None:
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


def test_a_rate_stands_beside_the_best_it_may_have_merged_to() -> None:
    def fed(composition: str, depth: int, merged: int, rate: float) -> rates.Fed:
        return rates.Fed(composition=composition, depth=depth, merged=merged, tokens_per_s=rate, spread=(rate, rate))

    found = {
        "short": fed("16×512", 2, 1, 90.0),
        "long": fed("1×3072", 4, 2, 60.0),
        "singles": fed("1×512", 32, 16, 81.0),
    }
    bare = pipeline_bare.Bare(
        batch_ms={}, batch_spread_ms={}, short_tokens_per_s={1: 100.0}, long_tokens_per_s={1: 50.0, 2: 75.0, 4: 99.0}
    )
    short, long, singles = rates.compare(SETTINGS, found, bare)
    assert (short.reference, short.ratio) == ("bare target", 0.9)
    assert (long.reference, long.ratio) == ("bare target, 2 a forward (the best)", 0.8)
    assert long.bare_tokens_per_s == {1: 50.0, 2: 75.0}
    assert (singles.reference, singles.ratio) == ("16×512, the ring", 0.9)
    exact = msgspec.structs.replace(SETTINGS, target={"exact": True})
    assert [rate.composition for rate in rates.compare(exact, found, bare)] == ["16×512", "1×3072"]


def test_blocks_are_whole_forwards() -> None:
    assert [len(block) for block in rates._blocks([1.0] * 20, 2)] == [4] * 5
    assert [len(block) for block in rates._blocks([1.0] * 384, 16)] == [48] * 8
    assert [len(block) for block in rates._blocks([1.0] * 9, 2)] == [2] * 4
    assert [len(block) for block in rates._blocks([1.0] * 3, 8)] == [3]


def test_a_plan_reads_it(result: Result, printed: tuple[str, Path], capsys: Any) -> None:
    path = printed[1].with_name("kept.json")
    assert msgspec.json.decode(path.read_bytes(), type=Result).rows == result.rows
    assert command(["plan", "--from", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["work"] == msgspec.to_builtins(result.work)
    assert result.work is not None
    assert (result.work.batch_tokens, result.work.tokens_per_sample) == (256, 64)
    assert balance(result.work).starves == "target"
    assert result.work.bytes_per_token == 3 * 32 * 4


def test_it_is_drawn_and_printed(result: Result, printed: tuple[str, Path], tmp_path: Path) -> None:
    assert "<svg" in printed[1].read_text(encoding="utf-8")
    pipeline_chart.write(result, tmp_path / "pipeline.png")
    assert (tmp_path / "pipeline.png").read_bytes().startswith(b"\x89PNG")
    from rich.console import Console

    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*pipeline_table.render(result), sep="\n")
    text = console.export_text()
    console.file.close()
    for part in ("co-located × 2", "seed protocol", "× seed", "bare target", "memory: daemons"):
        assert part in text


@pytest.fixture(scope="module")
def broken() -> tuple[Result, list[Result]]:
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

    def daemon_of(self: Settings, device: str, slots: int) -> Any:
        return msgspec.structs.replace(real_daemon(self, device, slots), transports=("shm",))

    settings = msgspec.structs.replace(
        SETTINGS, model=f"{TINY},ms=5", draft="synthetic:ms=2,params=64", depths=(0,), steps=3, warmup=1,
        sample_tokens=256, transports=("shm", "pigeon"), merge_depth=8,
    )  # fmt: skip
    kept: list[Result] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specd.bench.pipeline.run.CONNECT_S", 2.0)
        patch.setattr("specd.bench.pipeline.run.child", failing)
        patch.setattr("specd.bench.pipeline.origin_protocol.joined", unjoined)
        patch.setattr(Settings, "daemon", daemon_of)
        return run(settings, keep=kept.append), kept


def test_what_fails_is_left_out_and_all_else_is_kept(broken: tuple[Result, list[Result]]) -> None:
    result, kept = broken
    assert [(row.mode, row.transport) for row in result.rows] == [("disaggregated", "shm")]
    assert "pigeon" in result.skipped["disaggregated over pigeon"]
    assert result.skipped["the seed's protocol"] == "no group"
    assert "co-located" in result.skipped
    assert len(result.rates) == 3
    assert result.rows[0].bound_ms is not None
    assert [len(one.rows) for one in kept] == sorted(len(one.rows) for one in kept)
    assert kept[-1].rows == result.rows
    assert kept[0].work is None


def test_a_plan_reads_batches_of_one_sample(broken: tuple[Result, list[Result]]) -> None:
    work = broken[0].work
    assert work is not None
    assert (work.batch_tokens, work.tokens_per_sample) == (256, 256)
    assert balance(work).bytes_per_sample == 256 * 3 * 32 * 4


def test_what_cannot_begin_is_an_error() -> None:
    with pytest.raises(DaemonError, match="expected hidden ≥ 1"):
        run(msgspec.structs.replace(SETTINGS, model="synthetic:hidden=0"))


def test_a_bar_is_of_one_batch(result: Result) -> None:
    """Also where an iteration trains several, as its title says."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    pipeline_chart._times(axes, result.rows)
    ends = [text.get_position()[0] for text in axes.texts]
    assert ends == pytest.approx([row.iteration_ms / row.parallel for row in result.rows], rel=1e-3)
    assert [text.get_text() for text in axes.texts] == [
        f" {row.iteration_ms / row.parallel:.1f}" for row in result.rows
    ]
    assert result.rows[-1].parallel == 2


# The emulated protocol


def test_the_seeds_payload_is_the_one_its_issue_states() -> None:
    assert seed.payload_bytes(CaptureSpec(taps=(1, 12, 23, 34, 45)), 2048) == 20_504


@pytest.mark.parametrize("overlap", [False, True])
def test_the_emulation_delivers_the_targets_states(overlap: bool, tmp_path: Path) -> None:
    spec = CaptureSpec(taps=(1, 4), dtype="float32")
    settings = msgspec.structs.replace(SETTINGS, steps=4, warmup=1, depths=(0,))
    target = load_target(TargetConfig(model=TINY))
    drawn = batches(settings, "log-normal", 64, 5, 3)
    job = seed.Job(settings=settings, spec=spec, store=str(tmp_path / "store"), backend="gloo")
    with child("specd.bench.pipeline.origin_protocol", job) as server:
        serving = server.answer(seed.Serving)
        assert serving.error == ""
        assert serving.bare is not None
        assert all(rate > 0 for rate in serving.bare.short_tokens_per_s.values())
        with seed.joined("gloo", job.store, seed.TRAINER, 2) as group:
            seed.shake_hands(group, seed.TRAINER, "cpu")
            client = seed.Client(serving.port, group, "gloo", spec, target.contract, "cpu")
            with closing(client):
                found = list(client.stream(drawn, overlap))
    assert [one.batch.index for one in found] == [0, 1, 2, 3, 4]
    for one in found:
        assert one.taps is not None
        slot = pipeline_bare.slot(one.batch.num_tokens * 2 * 32 * 4, "cpu")
        target.run([pipeline_bare.fill(one.batch, spec, 32, slot)])
        states = torch.frombuffer(slot, dtype=torch.float32).view(-1, 2, 32)
        assert torch.equal(one.taps, states.to(torch.bfloat16))


def test_a_target_that_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, model="synthetic:hidden=0")
    job = seed.Job(settings=settings, spec=CaptureSpec(taps=(1,)), store=str(tmp_path / "store"), backend="gloo")
    with child("specd.bench.pipeline.origin_protocol", job) as server:
        assert "expected hidden ≥ 1" in server.answer(seed.Serving).error


def test_a_daemon_that_does_not_come_up_is_an_error_with_its_reason(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    config = msgspec.structs.replace(SETTINGS, model="synthetic:hidden=0").daemon("cpu", 4)
    with pytest.raises(DaemonError, match="expected hidden ≥ 1"), daemon(config, tmp_path / "d.sock"):
        pass


def test_a_transfer_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def recv(self, *_: Any) -> Any:
            return self

        def is_completed(self) -> bool:
            return False

    monkeypatch.setattr(seed, "HANDSHAKE_S", 0.0)
    monkeypatch.setattr("torch.zeros", lambda *_, **__: None)
    with pytest.raises(TransportError, match="nothing was transferred in 0 s"):
        seed.shake_hands(Silent(), seed.TRAINER, "cuda:1")
