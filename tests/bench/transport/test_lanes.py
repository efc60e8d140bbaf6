"""Lanes: pairs of devices, the transports that make sense on each, and rings within their memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from specd.bench.transport import lanes
from specd.errors import ConfigError, TransportError
from specd.transports.base import Traits

MIB = 1 << 20


@pytest.mark.parametrize(
    ("asked", "num_gpus", "found"),
    [
        ("all", 0, ["cpu"]),
        ("all", 1, ["same", "cpu"]),
        ("all", 4, ["peer", "same", "cpu"]),
        ("same", 2, ["same"]),
        ("cpu", 2, ["cpu"]),
    ],
)
def test_placements(asked: str, num_gpus: int, found: list[str]) -> None:
    assert [placement.name for placement in lanes.placements(asked, num_gpus)] == found


@pytest.mark.parametrize(
    ("asked", "reason"), [("peer", "needs 2 CUDA devices, this process sees 1"), ("tpu", "expected all, peer, same")]
)
def test_placements_that_are_not_here(asked: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        lanes.placements(asked, 1)


def titles(num_gpus: int, transports: Sequence[str]) -> list[str]:
    return [lane.title for lane in lanes.lanes(lanes.placements("all", num_gpus), transports)]


def test_lanes_of_one_gpu_and_of_two() -> None:
    known = ("inproc", "cuda_ipc", "nccl", "shm", "bytes")
    cpu = [f"cpu: {name}" for name in known]
    one = ["same: inproc", "same: cuda_ipc", "same: cuda_ipc borrow", "same: nccl", "same: shm", "same: bytes", *cpu]
    assert titles(1, known) == one
    peer = [f"peer: {name}" for name in ("cuda_ipc", "nccl", "shm", "bytes")]
    same = ["same: inproc", "same: cuda_ipc", "same: cuda_ipc borrow", "same: nccl"]
    assert titles(2, known) == [*peer, *same, *cpu]
    assert titles(0, ["pigeon"]) == ["cpu: pigeon"]


def traits(**changes: Any) -> Traits:
    known: dict[str, Any] = {"memory": frozenset({"host"}), "scope": "host", "one_sided": True, "abortable": True}
    return Traits(**{**known, "needs_recv_ready": False, **changes})


def test_a_ring_stays_within_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "free_shm", lambda: 30 << 30)
    monkeypatch.setattr(lanes, "free_on", lambda device: 140 << 30)
    sizes = [4096, 64 * MIB, 1024 * MIB]
    assert lanes.ring(sizes, "cuda:0", traits()) == (4, 1024 * MIB)
    assert lanes.ring(sizes, "cpu", traits()) == (1, 1024 * MIB)
    assert lanes.ring(sizes[:2], "cpu", traits()) == (4, 64 * MIB)
    monkeypatch.setattr(lanes, "free_on", lambda device: 24 << 30)
    assert lanes.ring(sizes, "cuda:0") == (1, 1024 * MIB)
    monkeypatch.setattr(lanes, "free_shm", lambda: 768 * MIB)
    assert lanes.ring(sizes, "cuda:0", traits()) == (4, 64 * MIB)
    assert lanes.ring(sizes, "cuda:0", traits(memory=frozenset({"device"}))) == (1, 1024 * MIB)
    assert lanes.ring(sizes, "cuda:0", traits(scope="anywhere")) == (1, 1024 * MIB)
    with pytest.raises(TransportError, match="/dev/shm has 256 MiB to spare"):
        lanes.ring(sizes[2:], "cuda:0", traits())
