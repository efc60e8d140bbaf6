"""The transport benchmark: the shape of its result, and that `verified` is a finding."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
from rich.console import Console

from specd.bench import transport as bench
from specd.errors import TransportError
from specd.transport import SlotRef
from specd.transports.shm import Shm, ShmClient

KEYS = {"transport", "size_bytes", "p50_us", "p99_us", "gb_per_s", "raw_gb_per_s", "ratio", "verified"}


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return bench.run(sizes=[1, 70_000], iterations=5)


def test_result_has_the_promised_shape(result: dict[str, Any]) -> None:
    assert {"machine", "auto", "rows"} <= set(result)
    assert json.loads(json.dumps(result)) == result
    assert [(row["transport"], row["size_bytes"]) for row in result["rows"]] == [
        (name, size) for name in ("inproc", "shm", "bytes") for size in (1, 70_000)
    ]
    for row in result["rows"]:
        assert set(row) >= KEYS
        assert row["verified"] is True
        assert row["iterations"] == 5
        assert 0 < row["min_us"] <= row["p50_us"] <= row["p99_us"]
        assert row["ratio"] == pytest.approx(row["raw_p50_us"] / row["p50_us"], rel=0.05, abs=0.001)
    assert {"cpu", "cores", "kernel", "python", "torch", "pyzmq", "commit"} <= set(result["machine"])
    assert (result["auto"], result["auto_reasons"], result["skipped"]) == ("shm", {}, {})


def test_table_shows_every_row(result: dict[str, Any]) -> None:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(bench.render(result))
    text = console.export_text()
    assert text.count("every byte") == len(result["rows"])
    assert "auto takes shm" in text


class _Wrong(ShmClient):
    """Delivers one wrong bit, in the last byte."""

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        super().fetch(ref, into, deadline_s)
        into[ref.nbytes - 1] ^= 1


def test_a_transport_that_corrupts_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shm, "client", staticmethod(lambda device: _Wrong()))
    result = bench.run(["shm"], [5000], 3)
    assert [row["verified"] for row in result["rows"]] == [False]
    assert result["auto"] == "bytes"
    assert "not the ones that were sent" in result["auto_reasons"]["shm"]


def test_a_named_transport_that_cannot_run_is_an_error() -> None:
    with pytest.raises(TransportError, match="unknown transport 'pigeon'"):
        bench.run(["pigeon"], [1], 1)


def test_one_that_was_not_named_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: str) -> ShmClient:
        raise TransportError("no shared memory here")

    monkeypatch.setattr(Shm, "client", staticmethod(refuse))
    monkeypatch.setattr(bench, "names", lambda: ["inproc", "shm"])
    result = bench.run(None, [100], 1)
    assert result["skipped"] == {"shm": "no shared memory here"}
    assert [row["transport"] for row in result["rows"]] == ["inproc"]


def test_the_real_batch_is_the_one_the_table_names() -> None:
    assert bench.BATCH_BYTES == 3072 * 5 * 2048 * 2
