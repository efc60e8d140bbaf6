"""The pipeline benchmark with tiny shapes: its rows and bounds, the emulated protocol's bytes, shared gradients."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from specd.balance import balance
from specd.bench import pipeline_bare, pipeline_chart, pipeline_table, seed
from specd.bench.pipeline_colocated import Reduction
from specd.bench.pipeline_defaults import defaults
from specd.bench.pipeline_draft import Given, TrainedDraft, clock, given, make_draft
from specd.bench.pipeline_processes import child, daemon
from specd.bench.pipeline_result import Result
from specd.bench.pipeline_work import Settings, batches
from specd.capture import CaptureSpec
from specd.cli.main import app
from specd.cli.main import run as command
from specd.config import TargetConfig
from specd.errors import ConfigError, DaemonError
from specd.targets import load_target
from specd.train.dflash import capture_spec

TINY = "synthetic:hidden=32,layers=8,vocab=64"
SETTINGS = defaults(True, 1, TINY, {})


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the command printed, and the chart it drew, for a target and a draft that sleep."""
    chart = tmp_path_factory.mktemp("chart") / "pipeline.html"
    options = ["--model", f"{TINY},ms=10", "--draft", "synthetic:ms=15,params=64", "--steps", "6"]
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
    assert set(result.target_ms) == set(result.draft_ms) == {"fixed"}
    assert {"cpu", "torch", "commit"} <= set(result.machine)


def test_bounds_and_costs_follow_from_what_was_measured(result: Result) -> None:
    target, draft = result.target_ms["fixed"][1], result.draft_ms["fixed"]
    assert target >= 10
    assert draft >= 15
    for row in result.rows:
        assert row.iterations == 6
        assert row.p10_ms <= row.p50_ms <= row.p90_ms
        samples = 4 * row.parallel
        assert row.samples_per_s == pytest.approx(samples / row.iteration_ms * 1e3, rel=1e-3)
        assert row.gpu_seconds_per_sample == pytest.approx(row.devices * row.iteration_ms / 1e3 / samples, rel=1e-3)
        assert (row.bound_ms is None) is (row.mode != "disaggregated")
        if row.bound_ms is not None:
            assert row.bound_ms == max(target, draft)
            assert row.efficiency == pytest.approx(row.bound_ms / row.iteration_ms, abs=1e-3)
            assert (row.daemon_memory_bytes or 0) > 1 << 20
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
    assert [(rate.composition, rate.depth, rate.bar) for rate in result.rates] == [
        ("8×32", 2, 0.95),
        ("1×256", 1, 0.95),
        ("1×32", 16, 0.8),
    ]
    for rate in result.rates:
        assert rate.ratio == pytest.approx(rate.tokens_per_s / rate.reference_tokens_per_s, abs=1e-3)
    # Eight samples share a forward: alone, each would take as long as all of them together.
    assert result.rates[2].tokens_per_s > 2.5 * 32 / 0.010


def test_a_plan_reads_it(result: Result, printed: tuple[str, Path], tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "pipeline.json"
    path.write_text(printed[0][: printed[0].rindex("}") + 1])
    assert command(["plan", "--from", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["work"] == msgspec.to_builtins(result.work)
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
    for part in ("co-located × 2", "seed protocol", "× seed", "bare target", "peak memory"):
        assert part in text


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
    with child("specd.bench.seed", job) as server:
        serving = server.answer(seed.Serving)
        assert serving.error == ""
        assert serving.bare is not None
        assert serving.bare.short_tokens_per_s > 0
        with seed.joined("gloo", job.store, seed.TRAINER, 2) as group:
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
    with child("specd.bench.seed", job) as server:
        assert "expected hidden ≥ 1" in server.answer(seed.Serving).error


def test_a_daemon_that_does_not_come_up_is_an_error_with_its_reason(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    config = msgspec.structs.replace(SETTINGS, model="synthetic:hidden=0").daemon("cpu", 4)
    with pytest.raises(DaemonError, match="expected hidden ≥ 1"), daemon(config, tmp_path / "d.sock"):
        pass


# The trainer's side


def test_data_parallel_gradients_are_the_mean_of_all(tmp_path: Path) -> None:
    found: dict[int, list[torch.Tensor]] = {}

    def one(rank: int) -> None:
        layer = torch.nn.Linear(3, 2)
        with torch.no_grad():
            layer.weight.fill_(0.5)
        with seed.joined("gloo", str(tmp_path / "store"), rank, 2) as group:
            reduction = Reduction(group, 2)
            reduction.attach(list(layer.parameters()))
            reduction.meet("cpu")
            reduction.on = True
            layer(torch.full((1, 3), float(1 + 2 * rank))).sum().backward()
            reduction()
            reduction.meet("cpu")
            found[rank] = [p.grad.clone() for p in layer.parameters() if p.grad is not None]

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for rank in (0, 1):
        assert torch.equal(found[rank][0], torch.full((2, 3), 2.0))
        assert torch.equal(found[rank][1], torch.ones(2))


def test_a_real_draft_learns_on_given_states() -> None:
    target = load_target(TargetConfig(model=TINY))
    settings = msgspec.structs.replace(SETTINGS, draft="dflash")
    draft = make_draft(settings, target.contract, lambda name: bytes(target.artifact(name)), "cpu")
    assert isinstance(draft, TrainedDraft)
    before = [parameter.detach().clone() for parameter in draft.parameters]
    spec = capture_spec(settings.dflash, target.contract)
    taps = torch.randn(256, len(spec.taps), 32)
    clocked = clock(given(batches(settings, "fixed", 64, 4, 1), taps), draft, 1, lambda: None)
    assert (len(clocked.seconds), clocked.samples, clocked.tokens) == (3, 12, 3 * 256)
    changed = [not torch.equal(old, new) for old, new in zip(before, draft.parameters, strict=True)]
    assert all(changed)


def test_the_clock_leaves_warm_up_out() -> None:
    marks: list[int] = []
    drawn = batches(SETTINGS, "fixed", 64, 5, 1)
    clocked = clock((Given(batch, None) for batch in drawn), None, 2, lambda: marks.append(len(marks)))
    assert (len(clocked.seconds), clocked.tokens, marks) == (3, 3 * 256, [0])


# Settings and batches


def test_batches_never_repeat_tokens_but_keep_their_lengths() -> None:
    one, other = (batches(SETTINGS, "log-normal", 64, 12, nonce) for nonce in (1, 2))
    assert [batch.lengths.tolist() for batch in one] == [batch.lengths.tolist() for batch in other]
    assert not any(np.array_equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))
    assert len({batch.tokens.tobytes() for batch in one}) == 12
    assert all(batch.num_tokens <= SETTINGS.batch_tokens for batch in one)
    assert len({length for batch in one for length in batch.lengths.tolist()}) > 4
    shifted = batches(SETTINGS, "log-normal", 64, 12, 1, shift=1)
    assert shifted[0].lengths.tolist() == one[1].lengths.tolist()


def test_what_can_share_a_forward_is_what_waits_and_fits() -> None:
    settings = Settings(model=TINY, batch_tokens=3072, forward_tokens=8192)
    assert [settings.merged(depth) for depth in (0, 1, 2, 4)] == [1, 1, 2, 2]
    assert msgspec.structs.replace(settings, target={"exact": True}).merged(4) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "ring.slots=3"], "--set ring: expected target.KEY=VALUE or draft.KEY=VALUE"),
        (["--depths", "two"], "--depths 'two': expected whole numbers"),
        (["--draft", "eagle"], "draft 'eagle': expected dflash or synthetic:ms=MILLISECONDS"),
        (["--chart", "x.gif"], "expected a file that ends in .png or .html"),
        (["--daemons", "0"], "--daemons 0"),
        (["--lengths", "uniform"], "uniform"),
        (["--sample-tokens", "999"], "samples of 999 tokens do not fit batches of 256"),
    ],
)
def test_settings_that_cannot_be_are_one_line(options: list[str], message: str, capsys: Any) -> None:
    assert command(["bench", "pipeline", "--quick", "--model", TINY, *options]) == 2
    assert message in capsys.readouterr().err


def test_unknown_draft_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_anchor"):
        _ = msgspec.structs.replace(SETTINGS, draft_config={"num_anchor": 3}).dflash
