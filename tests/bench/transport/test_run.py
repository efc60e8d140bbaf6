"""The transport benchmark on this machine: its rows, that `verified` is a finding, and how it is asked."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch

from specd.bench.transport import lanes, table
from specd.bench.transport import run as bench
from specd.bench.transport.result import Result
from specd.cli.main import run as command
from specd.errors import TransportError
from specd.transports.base import SlotRef
from specd.transports.shm import Shm, ShmClient


@pytest.fixture(scope="module")
def result() -> Result:
    return bench.run(["inproc", "shm", "bytes"], sizes=[1, 70_000], iterations=5, devices="cpu")


def test_result_has_the_promised_shape(result: Result) -> None:
    assert msgspec.json.decode(msgspec.json.encode(result), type=Result) == result
    assert [(row.transport, row.size_bytes) for row in result.rows] == [
        (name, size) for name in ("inproc", "shm", "bytes") for size in (1, 70_000)
    ]
    for row in result.rows:
        assert row.verified is True
        assert (row.placement, row.mode, row.raw_kind, row.shape) == ("cpu", "copy", "host copy", "")
        assert (row.iterations, row.stream_blocks, row.stream_window) == (5, 2, lanes.WINDOW)
        assert 0 < row.min_us <= row.p50_us <= row.p99_us
        assert row.raw_p50_us is not None
        assert row.ratio == pytest.approx(row.raw_p50_us / row.p50_us, rel=0.05, abs=0.001)
        assert row.stream_gb_per_s is not None
        assert row.d2h_gb_per_s is None
    assert {"cpu", "cores", "kernel", "python", "torch", "pyzmq", "commit", "gpus", "cupy"} <= set(result.machine)
    assert (result.slowdowns, result.skipped) == ((), {})


def test_what_auto_takes_between_processes_on_the_cpu(result: Result) -> None:
    (auto,) = result.auto
    assert (auto.name, auto.placement, auto.daemon, auto.trainer) == ("shm", "cpu", "cpu", "cpu")
    assert auto.reasons == {"bytes": "not tried: it comes after shm"}


class _Wrong(ShmClient):
    """Delivers one wrong bit, in the last byte."""

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        super().fetch(ref, into, deadline_s)
        into[ref.nbytes - 1] ^= 1


def test_a_transport_that_corrupts_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shm, "client", staticmethod(_Wrong))
    result = bench.run(["shm"], [5000], 3, devices="cpu")
    assert [row.verified for row in result.rows] == [False]
    assert [auto.name for auto in result.auto] == ["bytes"]
    assert "not the ones that were sent" in result.auto[0].reasons["shm"]


class _Once(ShmClient):
    """Delivers what it delivered first, whatever the slot holds since."""

    kept: torch.Tensor | None = None

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        super().fetch(ref, into, deadline_s)
        if ref.slot == 0:
            self.kept = into[: ref.nbytes].clone() if self.kept is None else self.kept
            into[: ref.nbytes] = self.kept


def test_a_transport_that_delivers_stale_bytes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shm, "client", staticmethod(_Once))
    assert [row.verified for row in bench.run(["shm"], [5000], 3, devices="cpu").rows] == [False]


def test_a_name_that_no_transport_has_is_an_error_at_once() -> None:
    with pytest.raises(TransportError, match="unknown transport 'pigeon'"):
        bench.run(["pigeon"], [1], 1)


def test_one_that_was_not_named_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: str) -> ShmClient:
        raise TransportError("no shared memory here")

    monkeypatch.setattr(Shm, "client", staticmethod(refuse))
    monkeypatch.setattr(bench, "names", lambda: ["inproc", "shm"])
    result = bench.run(None, [100], 1, devices="cpu")
    assert result.skipped == {"cpu: shm": "no shared memory here"}
    assert [row.transport for row in result.rows] == ["inproc"]


def test_the_real_batches_are_those_the_table_names() -> None:
    assert bench.SHAPES == {
        "EAGLE-3, 3,072 tokens": 3072 * 16_384,
        "DFlash-5, 3,072 tokens": 3072 * 20_480,
        "DFlash-5, 12,288 tokens": 12_288 * 20_480,
    }


def test_a_command_prints_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = tmp_path / "chart.html"
    options = ["--transports", "inproc", "--devices", "cpu", "--sizes", "4K", "--iterations", "5", "--json"]
    assert command(["bench", "transport", *options, "--chart", str(chart)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["size_bytes"] for row in printed["rows"]] == [4096]
    assert "<svg" in chart.read_text(encoding="utf-8")


def test_a_command_shows_what_there_is_and_fails_for_what_was_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(device: str) -> ShmClient:
        raise TransportError("no shared memory here")

    monkeypatch.setattr(Shm, "client", staticmethod(refuse))
    options = ["--devices", "cpu", "--sizes", "4K", "--iterations", "5", "--transports", "inproc,shm"]
    assert command(["bench", "transport", *options]) == 1
    out, err = capsys.readouterr()
    assert "inproc" in out
    assert "specd: error: shm cannot be measured: no shared memory here" in err


def test_a_chart_that_cannot_be_written_is_refused_before_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["bench", "transport", "--chart", "chart.gif"]) != 0
    assert "expected a file that ends in .png or .html" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (394.6, "395"), (54.31, "54.3"), (1.234, "1.23")])
def test_rates_are_readable(value: float | None, text: str) -> None:
    assert table.rate(value) == text
