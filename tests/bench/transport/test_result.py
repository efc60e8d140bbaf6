"""The transport benchmark's result: as JSON and back, and what its lanes are called."""

from __future__ import annotations

import msgspec
import pytest

from bench_results import two_gpus
from specd.bench.transport.result import TransportResult


def test_a_result_survives_json() -> None:
    result = two_gpus()
    assert msgspec.json.decode(msgspec.json.encode(result), type=TransportResult) == result
    with pytest.raises(msgspec.ValidationError, match=r"rows\[\d+\]\.mode"):
        msgspec.json.decode(msgspec.json.encode(result).replace(b'"borrow"', b'"lend"'), type=TransportResult)


def test_a_lane_is_a_transport_and_how_it_delivers() -> None:
    lanes = {row.lane for row in two_gpus().rows if row.placement == "same"}
    assert lanes == {"inproc", "cuda_ipc", "cuda_ipc borrow"}
