"""One row: timed in turn with raw copies of known times, compared, and the daemon's hop beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from movers import Timed
from specd.bench.transport import lanes, row, wires
from specd.bench.transport.lanes import DevicePair, Lane
from specd.bench.transport.row import OpenLane
from specd.bench.transport.served import Patterns, Served
from specd.transports.inproc import Inproc

CPU = lanes.placements("cpu", 0)[0]
PATTERNS = Patterns()


@pytest.fixture
def opened() -> Iterator[OpenLane]:
    """A real lane of this process, next to raw copies that all take 1 ms."""
    lane = Lane("inproc", Inproc.traits, CPU)
    with (
        contextlib.closing(Served("inproc", "cpu", 2, 4096, PATTERNS)) as served,
        wires.wire(served, lane, b"one") as wire,
    ):
        yield OpenLane(lane, served, wire, Timed(1e-3))


def test_a_row_stands_next_to_raw_copies(opened: OpenLane) -> None:
    found = row.measure(opened, PATTERNS, 3000, "a shape", 1.0, 5)
    assert (found.lane, found.placement, found.mode) == ("inproc", "cpu", "copy")
    assert (found.size_bytes, found.shape, found.iterations) == (3000, "a shape", 5)
    assert (found.raw_kind, found.raw_p50_us, found.stream_window) == ("made up", 1000, 2)
    assert found.ratio == pytest.approx(1000 / found.p50_us, rel=0.05)
    assert found.verified
    assert found.trainer_cpu_s_per_gb is not None
    assert found.daemon_cpu_s_per_gb == 0
    assert found.d2h_ratio is None


def test_what_is_lent_has_no_rate(opened: OpenLane) -> None:
    lent = opened._replace(lane=opened.lane._replace(borrow=True), raw=None)
    found = row.measure(lent, PATTERNS, 3000, "", 1.0, 5)
    assert (found.lane, found.raw_kind, found.ratio, found.gb_per_s) == ("inproc borrow", "", None, None)
    assert (found.stream_gb_per_s, found.trainer_cpu_s_per_gb) == (None, None)
    assert found.verified


def test_a_row_with_wrong_bytes_says_so(opened: OpenLane) -> None:
    assert not row.measure(opened, Patterns(), 3000, "", 1.0, 2).verified


@pytest.mark.parametrize(
    ("daemon", "memory", "one_sided", "staged"),
    [
        ("cuda:0", {"host"}, True, True),
        ("cuda:0", {"host"}, False, False),
        ("cuda:0", {"host", "device"}, True, False),
        ("cpu", {"host"}, True, False),
    ],
)
def test_only_host_memory_behind_a_gpu_is_staged(
    opened: OpenLane, daemon: str, memory: set[Any], one_sided: bool, staged: bool
) -> None:
    traits = msgspec.structs.replace(Inproc.traits, memory=frozenset(memory), one_sided=one_sided)
    opened.served.transport = type("Other", (Inproc,), {"traits": traits})
    lane = opened.lane._replace(placement=DevicePair("same", daemon, daemon))
    assert row.staged(opened._replace(lane=lane)) is staged


def test_a_hop_stands_next_to_its_raw_copy() -> None:
    class Shelved:
        def staging(self) -> Timed:
            return Timed(2e-3)

        def to_host(self) -> Timed:
            return Timed(1e-3)

    shelf: Any = Shelved()
    found = row.hop(shelf, 1 << 20, 1.0, 5)
    assert found["d2h_ratio"] == 0.5
    assert found["d2h_raw_gb_per_s"] == pytest.approx(1.0486, abs=1e-3)
