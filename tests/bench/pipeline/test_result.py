"""The pipeline benchmark's result: as JSON and back, under the names that others read."""

from __future__ import annotations

import json

import msgspec
import pytest

from pipeline_results import both_lengths
from specd.bench.pipeline.result import PipelineResult


def test_a_result_survives_json() -> None:
    result = both_lengths()
    encoded = msgspec.json.encode(result)
    assert msgspec.json.decode(encoded, type=PipelineResult) == result
    assert {row["mode"] for row in json.loads(encoded)["rows"]} == {
        "disaggregated", "origin", "co-located", "co-located data-parallel",
    }  # fmt: skip
    assert json.loads(encoded)["rows"][0]["over_origin"] == 1.1


def test_an_unknown_mode_is_refused() -> None:
    encoded = msgspec.json.encode(both_lengths()).replace(b'"origin"', b'"other"')
    with pytest.raises(msgspec.ValidationError, match=r"rows\[\d+\]\.mode"):
        msgspec.json.decode(encoded, type=PipelineResult)
