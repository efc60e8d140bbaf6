"""The pipeline benchmark with tiny shapes: its rows and bounds, the emulated protocol's bytes, shared gradients."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from specd.balance import balance
from specd.bench import pipeline_bare, pipeline_chart, pipeline_table, seed
from specd.bench import pipeline_processes as processes
from specd.bench import pipeline_rates as rates
from specd.bench.pipeline import run
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
from specd.errors import ConfigError, DaemonError, TransportError
from specd.targets import load_target
from specd.train.dflash import capture_spec

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


def test_what_fails_is_left_out_and_all_else_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemons' transport fails half-way, the serving process cannot be joined, the last one of two dies."""
    real = processes.child

    @contextmanager
    def broken(module: str, job: Any) -> Iterator[processes.Child]:
        if getattr(job, "rank", 0) == 1:
            job = msgspec.structs.replace(job, device="cuda:99")
        with real(module, job) as made:
            yield made

    def unjoined(*_: Any) -> Any:
        raise TransportError("no group")

    monkeypatch.setattr("specd.bench.pipeline.CONNECT_S", 2.0)
    monkeypatch.setattr("specd.bench.pipeline.child", broken)
    monkeypatch.setattr("specd.bench.seed.joined", unjoined)
    settings = msgspec.structs.replace(
        SETTINGS, model=f"{TINY},ms=5", draft="synthetic:ms=2,params=64", depths=(0,), steps=3, warmup=1,
        transports=("shm", "pigeon"),
    )  # fmt: skip
    settings = msgspec.structs.replace(settings, merge_depth=8)
    kept: list[Result] = []
    real_daemon = Settings.daemon

    def daemon_of(self: Settings, device: str, slots: int) -> Any:
        return msgspec.structs.replace(real_daemon(self, device, slots), transports=("shm",))

    monkeypatch.setattr(Settings, "daemon", daemon_of)
    result = run(settings, keep=kept.append)
    assert [(row.mode, row.transport) for row in result.rows] == [("disaggregated", "shm")]
    assert "pigeon" in result.skipped["disaggregated over pigeon"]
    assert result.skipped["the seed's protocol"] == "no group"
    assert "co-located" in result.skipped
    assert len(result.rates) == 3
    assert result.rows[0].bound_ms is not None
    assert [len(one.rows) for one in kept] == sorted(len(one.rows) for one in kept)
    assert kept[-1].rows == result.rows
    assert kept[0].work is None


def test_what_cannot_begin_is_an_error() -> None:
    with pytest.raises(DaemonError, match="expected hidden ≥ 1"):
        run(msgspec.structs.replace(SETTINGS, model="synthetic:hidden=0"))


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
    with child("specd.bench.seed", job) as server:
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


def test_processes_answer_in_any_order() -> None:
    reads, writes = zip(*(os.pipe() for _ in range(2)), strict=True)
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(os.fdopen(end, "rb", buffering=0)) for end in reads]
        log = stack.enter_context(tempfile.TemporaryFile())
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        children = [processes.Child(ended, end, log) for end in ends]
        os.write(writes[1], b"[1]\n[2]\n")
        found = processes.as_answered(children, list[int])
        assert next(found) == (1, [1])
        os.write(writes[0], b"[0]\n")
        assert next(found) == (0, [0])
        assert list(found) == []
        os.close(writes[0])
        with pytest.raises(DaemonError, match="ended with exit code 0"):
            dict(processes.as_answered(children[:1], list[int]))
        os.close(writes[1])


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
        (["--save", "/nowhere/x.json"], "--save '/nowhere/x.json': its directory does not exist"),
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
