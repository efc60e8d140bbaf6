"""`specd bench target` with a target that sleeps: every way and size, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from specd.bench.target.result import TargetResult
from specd.bench.target.run import Plan, run, settings_for
from specd.cli.main import run as command
from specd.errors import ConfigError

TINY = "synthetic:hidden=32,layers=8,vocab=64"
LEAST = {"max_forward_tokens": 64}


def test_every_way_is_measured_at_every_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "target.json"
    options = ["--sizes", "16,64", "--set", "target.max_forward_tokens=64", "--beside", "target.exact=true"]
    options += ["--rounds", "2", "--forwards", "3", "--save", str(saved), "--json"]
    assert command(["bench", "target", "-m", f"{TINY},ms=2", *options]) == 0
    result = msgspec.json.decode(saved.read_bytes(), type=TargetResult)
    assert json.loads(capsys.readouterr().out)["rows"] == json.loads(saved.read_bytes())["rows"]
    assert result.skipped == {}
    assert {(row.way, row.tokens, row.share) for row in result.rows} == {
        ("bare", 16, 1), ("bare", 16, 4), ("bare", 64, 1),
        ("beside", 16, 1), ("beside", 16, 4), ("beside", 64, 1),
        ("daemon", 16, 4), ("daemon", 64, 1),
    }  # fmt: skip
    for row in result.rows:
        assert len(row.by_round) == 2
        assert 0 < row.low <= row.tokens_per_s <= row.high
        if row.way != "daemon":  # two milliseconds and more for a forward
            assert row.high <= row.tokens * row.share / 0.002
    assert {ratio.name for ratio in result.ratios if ratio.bar is not None} == {
        "daemon / bare, 4 a forward", "daemon / bare, 1 a forward",
    }  # fmt: skip
    assert [profile.way for profile in result.profiles] == ["bare", "beside"]
    assert all(profile.forward_ms > 0 for profile in result.profiles)


def test_what_fails_beside_the_bare_target_is_left_out() -> None:
    plan = Plan(sizes=(16,), rounds=2, forwards=2, limit_s=0, beside={"num_layers": 3})
    kept: list[TargetResult] = []
    settings = msgspec.structs.replace(settings_for(TINY, plan, LEAST), transports=("nccl",))
    result = run(settings, plan, keep=kept.append)
    assert "nccl" in result.skipped["daemon"]
    assert "do not fit a target of 3 layers" in result.skipped["beside"]
    assert result.skipped["rounds"] == "1 of 2: 0 s were over"
    assert {row.way for row in result.rows} == {"bare"}
    assert [len(row.by_round) for row in result.rows] == [1, 1]
    assert kept[-1].rows == result.rows


@pytest.mark.parametrize(
    ("sizes", "target", "message"),
    [((16, 128), LEAST, "--sizes 128: a forward has at most target.max_forward_tokens=64"), ((16,), {"x": 1}, "`x`")],
)
def test_what_cannot_be_measured_is_refused_at_once(
    sizes: tuple[int, ...], target: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_for(TINY, Plan(sizes=sizes), target)


def test_beside_is_of_the_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["bench", "target", "-m", TINY, "--beside", "ring.slots=3"]) != 0
    assert "--beside ring.slots=3: expected target.KEY=VALUE" in capsys.readouterr().err
