"""`specd bench`: its options, what it refuses, and where it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline_results import both_lengths
from specd.bench.pipeline.result import PipelineResult
from specd.bench.pipeline.settings import Settings
from specd.cli import bench
from specd.cli.main import run
from specd.errors import ConfigError, TransportError
from specd.transports.shm import Shm, ShmClient

TINY = "synthetic:hidden=32,layers=8,vocab=64"


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5M", "0", "3T", "M"])
def test_bench_refuses_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="64M"):
        bench._bytes(text)


def test_bench_sizes() -> None:
    assert [bench._bytes(text) for text in ("17", "4k", "64M", "1G")] == [17, 4096, 64 << 20, 1 << 30]


def test_transport_prints_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = tmp_path / "chart.svg"
    options = ["--transports", "inproc", "--devices", "cpu", "--sizes", "4K", "--iterations", "5", "--json"]
    assert run(["bench", "transport", *options, "--chart", str(chart)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["size_bytes"] for row in printed["rows"]] == [4096]
    assert "<svg" in chart.read_text(encoding="utf-8")


def test_transport_shows_what_there_is_and_fails_for_what_was_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(device: str) -> ShmClient:
        raise TransportError("no shared memory here")

    monkeypatch.setattr(Shm, "client", staticmethod(refuse))
    options = ["--devices", "cpu", "--sizes", "4K", "--iterations", "5", "--transports", "inproc,shm"]
    assert run(["bench", "transport", *options]) == 1
    out, err = capsys.readouterr()
    assert "inproc" in out
    assert "specd: error: shm cannot be measured: no shared memory here" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "ring.slots=3"], "--set ring: expected target.KEY=VALUE or draft.KEY=VALUE"),
        (["--depths", "two"], "--depths 'two': expected whole numbers"),
        (["--set", "target.tp=abc"], "--set target.tp=abc: expected a whole number of GPUs, at least 1"),
        (["--set", "target.tp=0"], "--set target.tp=0: expected a whole number of GPUs, at least 1"),
        (["--draft", "eagle"], "draft 'eagle': expected dflash"),
        (["--draft", "synthetic:ms=1.2.3"], "draft 'synthetic:ms=1.2.3': its options are numbers"),
        (["--draft", "synthetic:ms:20"], "draft 'synthetic:ms:20': expected synthetic:KEY=NUMBER,…"),
        (["--draft", "synthetic:MS=20"], "unknown field `MS`"),
        (["--draft", "synthetic:ms=-5"], "draft 'synthetic:ms=-5': expected ms ≥ 0"),
        (["--transports", "shm,foo"], "--transports foo: expected some of inproc"),
        (["--save", "/tmp"], "--save '/tmp': it is a directory; name a file in it"),
        (["--save", f"/tmp/{'x' * 255}"], "it cannot be written (File name too long)"),
        (["--save", "/nowhere/x.json"], "--save '/nowhere/x.json': its directory does not exist"),
        (["--chart", "x.html"], "--chart 'x.html': expected a file that ends in .png or .svg, such as 'x.png'"),
        (["--daemons", "0"], "--daemons 0"),
        (["--lengths", "uniform"], "uniform"),
        (["--sample-tokens", "999"], "samples of 999 tokens do not fit batches of 256"),
    ],
)
def test_pipeline_refuses_in_one_line(
    options: list[str], message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specd.bench.pipeline.apart.daemon", lambda *_: pytest.fail("a daemon was started"))
    assert run(["bench", "pipeline", "--quick", "--model", TINY, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_pipeline_result_that_cannot_be_kept_does_not_end_the_run(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept.json"

    def measured(settings: Settings, progress: Any, keep: Any) -> Any:
        kept.mkdir()
        keep(settings)
        kept.rmdir()
        keep(settings)
        return settings

    monkeypatch.setattr("specd.bench.pipeline.run.run", measured)
    options = ["--quick", "--model", TINY, "--save", str(kept), "--json"]
    assert run(["bench", "pipeline", *options]) == 0
    said = capsys.readouterr()
    assert f"--save {kept}: not written this time: Is a directory" in said.err
    assert msgspec.json.decode(kept.read_bytes()) == msgspec.json.decode(said.out)


def test_pipeline_prints_saves_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(settings: Settings, progress: Any, keep: Any) -> PipelineResult:
        keep(found)
        return found

    found, chart, kept = both_lengths(), tmp_path / "pipeline.png", tmp_path / "kept.json"
    monkeypatch.setattr("specd.bench.pipeline.run.run", measured)
    options = ["--quick", "--model", TINY, "--save", str(kept), "--chart", str(chart)]
    assert run(["bench", "pipeline", *options]) == 0
    said = capsys.readouterr()
    assert "co-located × 2" in said.out
    assert f"chart: {chart}" in said.err
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert msgspec.json.decode(kept.read_bytes(), type=PipelineResult) == found
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.json", "pipeline.png"]


def test_daemon_shows_a_table_for_each_question(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"latency": [{"transport": "shm", "p50_ms": 1.8}], "overlap": [{"transport": "shm", "depth": 2}]}
    monkeypatch.setattr("specd.bench.daemon.run", lambda: found)
    assert run(["bench", "daemon"]) == 0
    text = capsys.readouterr().out
    assert "latency" in text
    assert "depth" in text
    assert run(["bench", "daemon", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.usefixtures("example")
@pytest.mark.parametrize("method", ["dflash", "toy"])
def test_draft_measures_a_plugin_as_it_does_its_own(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", method, "--steps", "1", "--context", "32"]
    assert run(["bench", "draft", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["draft"].get("loss_chunk") == (2048 if method == "dflash" else None)
    assert [row["context_tokens"] for row in found["rows"]] == [32]
    assert run(["bench", "draft", *options]) == 0
    assert found["method"] in capsys.readouterr().out


def test_draft_takes_settings_of_the_draft(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "dflash2", "--steps", "1", "--context", "32", "--json"]
    assert run(["bench", "draft", *options, "--set", "draft.block_size=4", "--set", "draft.num_anchors=3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"][0]["rows"], found["draft"]["loss_chunk"]) == (12, 2048)
    assert run(["bench", "draft", *options, "--set", "target.tp=2"]) == 2
    assert "--set target.tp=2: expected draft.KEY=VALUE" in capsys.readouterr().err
