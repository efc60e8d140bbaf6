"""What runs want of one target together, and whether a daemon has room for it."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from daemons import REPORT
from specd.cli.fit import captured, check_room, hosting, unlike
from specd.config.load import convert
from specd.config.settings import RunConfig
from specd.errors import ConfigError
from specd.protocol.batch import slot_bytes
from specd.protocol.contract import RingInfo, TargetContract

CONTRACT = TargetContract(
    model="t", model_type="llama", hidden_size=8, num_layers=10, vocab_size=64, dtype="float32", weights=""
)


def run(method: str, **settings: Any) -> RunConfig:
    return convert({"method": method, "data": {"batch_tokens": 64}, **settings}, RunConfig, "settings")


RUNS = {
    "a": run("eagle3"),
    "b": run("dflash", draft={"num_taps": 4}, validation={"decode_every": 5}, subscriber={"depth": 4}),
}


def test_what_runs_want_together() -> None:
    taps = {*captured({"a": RUNS["a"]}, CONTRACT).taps, *captured({"b": RUNS["b"]}, CONTRACT).taps}
    both = captured(RUNS, CONTRACT)
    assert (set(both.taps), both.final) == (taps, True)
    assert captured({"b": RUNS["b"]}, CONTRACT).final, "to decode"
    assert sum(run.sessions for run in RUNS.values()) == 3
    found = hosting(RUNS, CONTRACT)
    assert found == {
        "capture": {"num_taps": len(taps), "final": True},
        "ring": {"slots": 15, "slot_tokens": 64, "max_sessions": 3},
    }
    assert hosting(RUNS, None)["capture"] == {"num_taps": 7, "final": True}, "at most so many"


def test_a_daemon_without_room_is_told_what_to_change() -> None:
    bytes_needed = slot_bytes(captured(RUNS, CONTRACT), 8, 64)
    report = replace(REPORT, contract=CONTRACT, max_sessions=3, sessions=())
    ring = RingInfo(num_slots=9, slot_bytes=bytes_needed, slot_tokens=64)
    check_room(replace(report, ring=ring), RUNS, "ipc://d")
    check_room(replace(report, contract=None), RUNS, "ipc://d")
    small = RingInfo(num_slots=9, slot_bytes=bytes_needed // 4, slot_tokens=32)
    with pytest.raises(ConfigError) as error:
        check_room(replace(report, ring=small, max_sessions=2), RUNS, "ipc://d")
    count = len(captured(RUNS, CONTRACT).taps)
    assert str(error.value) == (
        f"ipc://d has no room for these runs: {count} taps + final = {32 * (count + 1)} bytes a token, where slots "
        f"hold {small.slot_bytes // 32}; batches of 64 tokens, where a slot has 32; 3 trainers, where 0 of 2 are "
        f"taken: specd start … --set capture.num_taps={count} --set capture.final=true --set capture.dtype=float32 "
        f"--set ring.slot_tokens=64 --set ring.max_sessions=3"
    )


def test_runs_of_other_batches_are_named() -> None:
    assert [*unlike(RUNS)] == []
    others = {"c": run("dflash", train={"seed": 3}), "d": run("eagle3", data={"batch_tokens": 32, "processes": 3})}
    assert [*unlike(RUNS | others)] == [
        "run c shares no forwards with a, as its batches are others: train.seed is 3, there 0",
        "run d shares no forwards with a, as its batches are others: data.batch_tokens is 32, there 64",
    ]
