"""`specd plan`: from flags, from a benchmark, from a run, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from specd.cli.main import run
from specd.plan.balance import Balance, Work
from specd.train.directory import RunFacts, write_facts
from specd.train.journal import Journal, StepRecord, TrainedBatch

RATES = ["--target-tokens-per-s", "43800", "--draft-tokens-per-s", "51000"]


def plan(capsys: pytest.CaptureFixture[str], *options: str) -> Balance:
    assert run(["plan", *options, "--json"]) == 0
    return msgspec.json.decode(capsys.readouterr().out, type=Balance)


def test_flags_and_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, *RATES, "--model", "qwen3-30b-a3b-fp8", "--samples", "50000", "--epochs", "6")
    assert (found.work.bytes_per_token, found.work.batch_tokens) == (20_480, 3072)
    assert found.starves == "draft"
    assert found.target_s == pytest.approx(0.0701, abs=1e-4)
    assert found.colocated.hours == pytest.approx(50_000 * 6 * (3072 / 43_800 + 3072 / 51_000) / 3600)
    assert plan(capsys, *RATES, "--model", "qwen3-30b-a3b-fp8", "--num-taps", "3").work.bytes_per_token == 12_288
    rounded = plan(capsys, *RATES, "--model", "qwen3-30b-a3b-fp8", "--dtype", "float8_e4m3fn").work
    assert rounded.bytes_per_token == 5 * (2048 + 4)
    assert run(["plan", *RATES, "--dtype", "float8_e4m3fn", "--bytes-per-token", "9", "--batch-tokens", "9"]) == 2
    assert "--dtype float8_e4m3fn: expected --model with it" in capsys.readouterr().err
    assert run(["plan", *RATES, "--model", "qwen3-30b-a3b-fp8", "--dtype", "int8"]) == 2
    assert "--dtype 'int8': expected auto, for the preset's, or one of float32, " in capsys.readouterr().err


def test_the_verdict_stands_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    options = [*RATES, "--batch-tokens", "3072", "--bytes-per-token", "20480", "--samples", "50000"]
    assert run(["plan", *options]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in ("the draft starves", "1.16 daemons a trainer", "co-location is the better choice", "62,914,560 bytes"):
        assert part in out
    assert run(["plan", "--target-tokens-per-s", "9000", *options[2:]]) == 0
    assert "5.67 daemons a trainer balance them" in " ".join(capsys.readouterr().out.split())


def test_daemons_and_trainers_are_judged_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    options = [*RATES, "--batch-tokens", "3072", "--bytes-per-token", "20480", "--daemons", "2"]
    found = plan(capsys, *options, "--trainers", "6")
    assert found.asked is not None
    assert (found.asked.name, found.data_parallel.name) == ("2 : 6", "co-located × 8")
    assert run(["plan", *options]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "2 : 1 trains 2.16 × the samples/s of 1 GPU co-located, and 0.72 × those of 3 GPUs" in out
    assert "co-locate unless a target that runs batches alone takes over 120.5 ms for one: here 70.1 ms" in out


def test_states_that_are_kept_are_weighed_against_the_target(capsys: pytest.CaptureFixture[str]) -> None:
    options = [*RATES, "--batch-tokens", "3072", "--bytes-per-token", "20480", "--daemons", "1", "--trainers", "1"]
    data = ["--samples", "50000", "--tokens-per-sample", "2000", "--epochs", "6"]
    store = ["--replay-gb", "2500", "--disk-gb-s", "0.3"]
    assert run(["plan", *options, *data, *store]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in ("1 : 1: does not pay", "recompute is 3.0 × faster than 0.3 GB/s", "breaks even at 0.9 GB/s"):
        assert part in out
    assert run(["plan", *options, *data, *store, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["replay"]["outcome"] == "does not pay"
    assert run(["plan", *options, *store]) == 2
    assert "--replay-gb without the size of the data" in capsys.readouterr().err
    assert run(["plan", *options, *data, *store[:2]]) == 2
    assert "--replay-gb 2500.0 --disk-gb-s None: expected both, or neither" in capsys.readouterr().err


def test_a_benchmark_gives_the_rates_and_flags_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = Work(
        target_tokens_per_s=80_000,
        colocated_target_tokens_per_s=7_500,
        colocated_tokens_per_s={1: 7_000, 2: 13_000},
        efficiency=0.9,
        draft_tokens_per_s=50_000,
        batch_tokens=512,
        bytes_per_token=20_480,
    )
    path = tmp_path / "pipeline.json"
    path.write_bytes(msgspec.json.encode({"rows": [], "work": work}))
    assert plan(capsys, "--from", str(path)).work == work
    pair = ["--daemons", "1", "--trainers", "1"]
    found = plan(capsys, "--from", str(path), "--target-tokens-per-s", "60000", "--depth", "8", *pair)
    assert (found.work.target_tokens_per_s, found.work.depth, found.better) == (60_000, 8, "disaggregated")
    assert (found.work.colocated_tokens_per_s, found.work.efficiency) == ({}, 1.0), "measured with another target"
    assert plan(capsys, "--from", str(path), *pair).data_parallel.samples_per_s == pytest.approx(13_000 / 512)
    found = plan(capsys, "--from", str(path), "--colocated-tokens-per-s", "30000", *pair)
    assert (found.work.colocated_tokens_per_s, found.better) == ({1: 30_000}, "co-located")
    assert run(["plan", "--from", str(path), *pair]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "co-location as measured: 0.93 of target and draft one after the other" in out
    assert "pipelines as measured: 0.90 of what these rates allow" in out
    assert "less GPU time a sample than co-location does on as many GPUs" in out


def test_a_benchmark_that_was_cut_short_has_no_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pipeline.json"
    path.write_text('{"rows": [], "work": null}')
    assert run(["plan", "--from", str(path)]) == 2
    assert "this benchmark ended before it had rates; run it again" in capsys.readouterr().err


def test_a_co_located_run_tells_what_both_take_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = {"forward_s": 0.02, "draft_s": 0.05, "train_s": 0.055, "target_wait_s": 0.005}
    for name, (target, found) in enumerate(
        (({"model": "tiny"}, {1: pytest.approx(400 / 0.06)}), ({"model": "tiny", "device": "cuda:1"}, {}), (None, {}))
    ):
        run_directory = a_run(tmp_path / str(name), {"target": target} if target else {}, **times)
        assert plan(capsys, "--from", run_directory).work.colocated_tokens_per_s == found


def test_a_run_of_several_ranks_tells_what_one_of_them_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokens of a step are those of all; the time of a draft's step is one's own."""
    run_directory = a_run(tmp_path, {"target": {"model": "tiny"}}, forward_s=0.04, draft_s=0.05, train_s=0.06)
    journal = tmp_path / "metrics.jsonl"
    journal.write_text(journal.read_text().replace('"ranks":1', '"ranks":2'))
    found = plan(capsys, "--from", run_directory).work
    assert found.draft_tokens_per_s == pytest.approx(400 / 2 / 0.05)
    assert found.target_tokens_per_s == pytest.approx(400 / 0.04)
    assert found.colocated_tokens_per_s == {2: pytest.approx(400 / 0.06)}


def a_run(path: Path, method: dict[str, object] | None = None, /, **times: float) -> str:
    """A run directory of 20 co-located steps, the first two a hundred times as slow: they compile."""
    facts = RunFacts(
        started="",
        target={"model": "tiny", "hidden size": 64, "dtype": "float32"},
        draft={"taps": "1, 2, 4"},
        data={"samples": "1,200"},
        transports={"inproc://x": "inproc"},
        machine={},
        config={"subscriber": {"depth": 3}, "train": {"epochs": 2}, **(method or {})},
    )
    path.mkdir(exist_ok=True)
    write_facts(path, facts)
    with Journal(path / "metrics.jsonl") as journal:
        for step in range(1, 21):
            slow = 100.0 if step <= 2 else 1.0
            journal.append(_record(step, **{name: slow * seconds for name, seconds in times.items()}))
    return str(path)


def test_a_run_gives_the_rates_of_its_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--from", a_run(tmp_path, forward_s=0.02, draft_s=0.05, train_s=0.05)).work
    assert found.target_tokens_per_s == pytest.approx(400 / 0.02)
    assert found.colocated_target_tokens_per_s == found.target_tokens_per_s
    assert found.draft_tokens_per_s == pytest.approx(400 / 0.05)
    assert (found.batch_tokens, found.tokens_per_sample, found.bytes_per_token) == (400, 200, 3 * 64 * 4)


def test_batches_that_needed_no_forward_tell_nothing_of_the_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = a_run(tmp_path, forward_s=0.02, draft_s=0.05, train_s=0.05)
    with Journal(tmp_path / "metrics.jsonl", 20) as journal:
        for step in range(21, 41):
            free = _record(step, train_s=0.05, draft_s=0.05)
            journal.append(msgspec.structs.replace(free, replayed=step % 2, shared=1 - step % 2))
    assert plan(capsys, "--from", path).work.target_tokens_per_s == pytest.approx(400 / 0.02)


def test_a_run_of_a_draft_that_reads_the_final_state_costs_it_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eagle: dict[str, object] = {"method": "eagle3", "draft": {"num_steps": 3}}
    found = plan(capsys, "--from", a_run(tmp_path, eagle, forward_s=0.02, draft_s=0.05, train_s=0.05)).work
    assert found.bytes_per_token == (3 + 1) * 64 * 4
    eagle["capture"] = {"dtype": "float8_e4m3fn"}
    rounded = plan(capsys, "--from", a_run(tmp_path / "r", eagle, forward_s=0.02, draft_s=0.05, train_s=0.05)).work
    assert rounded.bytes_per_token == (3 + 1) * (64 + 4)
    assert (found.samples, found.epochs, found.depth) == (1200, 2, 3)


def test_a_step_that_ran_during_a_wait_counts_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_directory = a_run(tmp_path, forward_s=0.2, draft_s=0.08, target_wait_s=0.18, train_s=0.02)
    assert plan(capsys, "--from", run_directory).work.draft_tokens_per_s == pytest.approx(400 / 0.08)


def test_a_journal_without_draft_times_tells_the_rate_of_a_run_that_never_waited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_directory = a_run(tmp_path, forward_s=0.02, target_wait_s=0.001, wire_wait_s=0.001, train_s=0.048)
    assert plan(capsys, "--from", run_directory).work.draft_tokens_per_s == pytest.approx(400 / 0.048)


@pytest.mark.parametrize("wait", ["target_wait_s", "wire_wait_s"])
def test_one_that_waited_does_not_tell_it(wait: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_directory = a_run(tmp_path, forward_s=0.2, train_s=0.2, **{wait: 0.05})
    assert run(["plan", "--from", run_directory]) == 2
    error = capsys.readouterr().err
    assert "no draft_s, and its steps waited 0.9 of 4.5 s" in error
    assert "give --draft-tokens-per-s" in error
    assert plan(capsys, "--from", run_directory, "--draft-tokens-per-s", "5000").work.draft_tokens_per_s == 5000


def test_a_run_without_forwards_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = a_run(tmp_path, draft_s=0.05, train_s=0.05)
    assert run(["plan", "--from", path]) == 2
    assert "its journal has no step with a forward time yet" in capsys.readouterr().err
    assert plan(capsys, "--from", path, "--target-tokens-per-s", "5000").work.target_tokens_per_s == 5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --target-tokens-per-s, --draft-tokens-per-s, --batch-tokens, --bytes-per-token"),
        ([*RATES, "--model", "nothing"], "--model 'nothing': expected one of"),
        ([*RATES, "--model", "qwen3-8b", "--batch-tokens", "0"], "--batch-tokens 0: expected a number, more than 0"),
        (["--from", "missing.json"], "--from 'missing.json' cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_error(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"work": {"target_tokens_per_s": 1}})])
def test_a_file_of_another_kind_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    assert run(["plan", "--from", str(path)]) == 2
    assert "is not the JSON of `specd bench pipeline`" in capsys.readouterr().err


def _record(
    step: int,
    *,
    train_s: float,
    forward_s: float = 0.0,
    draft_s: float = 0.0,
    target_wait_s: float = 0.0,
    wire_wait_s: float = 0.0,
) -> StepRecord:
    return StepRecord(
        step=step,
        epoch=0,
        batches=(TrainedBatch(epoch=0, index=step, samples=(2 * step, 2 * step + 1)),),
        loss=1.0,
        teacher_forced_accuracy=None,
        teacher_forced_by_offset=(),
        lr=0.0,
        grad_norm=1.0,
        weight=1.0,
        tokens=400,
        step_s=target_wait_s + wire_wait_s + train_s,
        target_wait_s=target_wait_s,
        wire_wait_s=wire_wait_s,
        train_s=train_s,
        forward_s=forward_s,
        busy_slots=0,
        num_slots=8,
        draft_s=draft_s,
    )
