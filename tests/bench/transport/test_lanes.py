"""The arithmetic of the transport benchmark, with movers whose times are known, and its GPU lanes with stand-ins."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest

from specd.bench.transport import lanes, load, timing
from specd.bench.transport import run as bench
from specd.bench.transport.lanes import Placement
from specd.bench.transport.raw import Raw
from specd.bench.transport.result import Result, Row
from specd.errors import ConfigError, TransportError
from specd.memory.arena import Arena
from specd.transports.base import ServerContext, Traits, Transport
from specd.transports.inproc import Inproc, InprocClient, InprocServer
from specd.transports.testing.hosts import LocalHost

MIB = 1 << 20


class Timed:
    """A mover that says it took given seconds, in turn; a stream takes half of them each."""

    kind = "made up"

    def __init__(self, *seconds: float, log: list[str] | None = None, name: str = "") -> None:
        self._seconds = itertools.cycle(seconds)
        self._log = [] if log is None else log
        self._name = name

    def one(self, nbytes: int) -> float:
        self._log.append(self._name)
        return next(self._seconds)

    def stream(self, nbytes: int, count: int) -> float:
        self._log.append(f"{self._name} × {count}")
        return count * next(self._seconds) / 2

    def close(self) -> None:
        pass


def test_latency_is_the_median_next_to_raw_copies_in_turn() -> None:
    log: list[str] = []
    wire, raw = Timed(1e-3, 2e-3, 6e-3, log=log, name="wire"), Timed(1e-3, log=log, name="raw")
    found = timing.latency(wire, raw, 2_000_000, 1.0, iterations=6)
    assert log == ["raw", "wire"] * (timing.WARM_UP + 6)
    assert (found["p50_us"], found["min_us"], found["raw_p50_us"]) == (2000, 1000, 1000)
    assert (found["gb_per_s"], found["raw_gb_per_s"], found["ratio"]) == (1.0, 2.0, 0.5)
    assert found["min_us"] <= found["p25_us"] <= found["p50_us"] <= found["p75_us"] <= found["p99_us"] <= 6000


def test_without_a_raw_copy_there_is_no_rate() -> None:
    found = timing.latency(Timed(3e-6), None, MIB, 1.0, iterations=5)
    assert found["p50_us"] == 3
    assert {found[key] for key in ("gb_per_s", "raw_p50_us", "raw_min_us", "raw_gb_per_s", "ratio")} == {None}


@pytest.mark.parametrize(
    ("seconds", "allowance_s", "count"),
    [(1e-3, 0.2, 100), (1e-6, 2.0, timing.MAX_ITERATIONS), (0.5, 0.2, timing.MIN_ITERATIONS)],
)
def test_as_many_iterations_as_the_time_allows(seconds: float, allowance_s: float, count: int) -> None:
    found = timing.latency(Timed(seconds), Timed(seconds), MIB, allowance_s, iterations=0)
    assert found["iterations"] == count


def test_a_stream_is_measured_in_blocks_in_turn() -> None:
    log: list[str] = []
    wire, raw = Timed(4e-3, log=log, name="wire"), Timed(2e-3, log=log, name="raw")
    found = timing.streamed(wire, raw, 1_000_000, 4, 1.0)
    assert log[:2] == ["wire × 4", "raw × 4"]
    assert set(log[2:]) == {"wire × 32", "raw × 32"}
    assert log[2:] == ["wire × 32", "raw × 32"] * found["stream_blocks"]
    assert (found["stream_gb_per_s"], found["raw_stream_gb_per_s"], found["stream_ratio"]) == (0.5, 1.0, 0.5)
    assert found["stream_min_gb_per_s"] == found["stream_p25_gb_per_s"] == found["stream_p75_gb_per_s"] == 0.5
    assert found["stream_window"] == 4


def test_slow_transfers_are_streamed_in_short_blocks() -> None:
    log: list[str] = []
    found = timing.streamed(Timed(1.0, log=log, name="w"), Timed(0.1, log=log, name="r"), MIB, 3, 0.5)
    assert set(log) == {"w × 3", "r × 3"}
    assert found["stream_blocks"] == 2


def test_the_slowest_block_is_told() -> None:
    found = timing.streamed(Timed(2e-3, 2e-3, 8e-3), Timed(1e-3), 1_000_000, 16, 0.0, blocks=3)
    assert (found["stream_gb_per_s"], found["stream_min_gb_per_s"], found["stream_blocks"]) == (1.0, 0.25, 3)


def test_the_budget_is_shared_by_the_rows_that_are_left() -> None:
    now = 100.0
    budget = timing.Budget(10.0, lambda: now)
    assert budget.share(20) == 0.5
    assert budget.share(20, reserved_s=4) == 0.3
    assert budget.share(1) == timing.ROW_S
    now = 108.0
    assert (budget.left, budget.spent, budget.share(4)) == (2.0, 8.0, 0.5)
    now = 120.0
    assert (budget.left, budget.share(4)) == (0.0, 0.0)


class Busy:
    """A load that reaches given TFLOP/s, one after the other."""

    def __init__(self, *reached: float) -> None:
        self._reached = iter(reached)
        self.running = False

    def start(self) -> None:
        assert not self.running
        self.running = True

    def stop(self) -> float:
        assert self.running
        self.running = False
        return next(self._reached)


def test_a_slowdown_is_alone_against_during_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "SEGMENT_S", 0.001)
    busy: Any = Busy(680.0, 640.0, 670.0, 646.0, 690.0)
    found = load.slowdown(busy, Timed(2e-3), 1_000_000)
    assert (found["alone_tflop_per_s"], found["during_tflop_per_s"]) == (680, 643)
    assert found["slowdown"] == pytest.approx(1 - 643 / 680, abs=1e-4)
    assert found["alone_spread"] == pytest.approx(20 / 680, abs=1e-4)
    assert (found["gb_per_s"], found["size_bytes"]) == (1.0, 1_000_000)


def test_a_load_that_fails_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "SEGMENT_S", 0.001)

    class Broken(Timed):
        def stream(self, nbytes: int, count: int) -> float:
            if busy.running:
                raise TransportError("the daemon is gone")
            return 1.0

    busy: Any = Busy(1.0, 1.0)
    with pytest.raises(TransportError, match="gone"):
        load.slowdown(busy, Broken(1.0), MIB)
    assert not busy.running


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


class Ipc:
    """Stands for cuda_ipc: inproc's sides under its traits."""

    traits: ClassVar[Traits] = traits(memory=frozenset({"host", "device"}), borrow=True, floor_gb_s=1e-9)

    @staticmethod
    def server(arena: Arena, context: ServerContext) -> InprocServer:
        return Inproc.server(arena, context)

    @staticmethod
    def client(device: str) -> InprocClient:
        return Inproc.client(device)


class Staged(Ipc):
    """Stands for shm."""

    traits: ClassVar[Traits] = traits()


class Refusing(Ipc):
    """Stands for nccl where there is none."""

    traits: ClassVar[Traits] = traits(memory=frozenset({"host", "device"}), floor_gb_s=1e9)

    @staticmethod
    def server(arena: Arena, context: ServerContext) -> InprocServer:
        raise TransportError("no NCCL here")


class Slow(Ipc):
    """A plug-in that does not reach the floor it gives itself."""

    traits: ClassVar[Traits] = traits(memory=frozenset({"host", "device"}), floor_gb_s=1e9)


class Shelved:
    """A shelf of movers of known times: every raw copy takes 1 ms, a staged hop 2 ms."""

    def __init__(self, daemon: str, trainer: str, nbytes: int, count: int) -> None:
        self.ring = count, nbytes

    def for_transport(self, name: str, memory: frozenset[str]) -> Raw:
        return Timed(1e-3)

    def to_host(self) -> Raw:
        return Timed(1e-3)

    def staging(self) -> Raw:
        return Timed(2e-3)

    def close(self) -> None:
        pass


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that seems to have a GPU; all memory is the host's, and daemons are in this process."""
    built_in: dict[str, type[Transport]] = {"cuda_ipc": Ipc, "nccl": Refusing, "shm": Staged, "slow": Slow}

    def local(name: str, num_slots: int, slot_bytes: int, device: str) -> LocalHost:
        return LocalHost(built_in[name], num_slots, slot_bytes)

    def find(name: str) -> type[Transport]:
        return built_in[name]

    monkeypatch.setattr(lanes, "SpawnedHost", local)
    monkeypatch.setattr(lanes, "load", find)
    monkeypatch.setattr(lanes, "free_on", lambda device: 140 << 30)
    monkeypatch.setattr(bench, "load_transport", find)
    monkeypatch.setattr(bench, "names", lambda: list(built_in))
    monkeypatch.setattr(bench, "Shelf", Shelved)
    monkeypatch.setattr(lanes, "placements", lambda asked, num_gpus: [Placement("peer", "cuda:0", "cpu")])
    monkeypatch.setattr(load, "SEGMENT_S", 0.001)
    monkeypatch.setattr(load, "HostLoad", lambda host: Busy(100.0, 96.0, 100.0, 96.0, 100.0))
    monkeypatch.setattr(load, "Load", lambda device: Busy(100.0, 80.0, 100.0, 80.0, 100.0))


def by_lane(result: Result) -> dict[tuple[str, int], Row]:
    return {(row.lane, row.size_bytes): row for row in result.rows}


@pytest.mark.usefixtures("peer")
def test_a_run_with_a_peer_gpu() -> None:
    result = bench.run(["cuda_ipc", "shm"], [5000, MIB], 5)
    rows = by_lane(result)
    assert list(rows) == [(name, size) for name in ("cuda_ipc", "shm") for size in (5000, MIB)]
    for row in rows.values():
        assert row.verified
        assert row.ratio == pytest.approx(1000 / row.p50_us, rel=0.02)
        assert (row.raw_kind, row.raw_p50_us, row.stream_window) == ("made up", 1000, 4)
    hop = rows["shm", MIB]
    assert hop.d2h_ratio == 0.5
    assert hop.d2h_raw_gb_per_s == pytest.approx(MIB / 1e6, abs=1e-3)
    assert rows["cuda_ipc", MIB].d2h_gb_per_s is None
    found = [(one.transport, one.side, one.slowdown, one.size_bytes) for one in result.slowdowns]
    sides = (("daemon", 0.04), ("trainer", 0.2))
    assert found == [(name, *side, MIB) for name in ("cuda_ipc", "shm") for side in sides]
    assert result.skipped == {}


@pytest.mark.usefixtures("peer")
def test_a_row_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "free_shm", lambda: 3 * MIB)
    result = bench.run(["shm"], [4096, 2 * MIB], 5)
    assert [row.size_bytes for row in result.rows] == [4096]
    assert result.skipped == {"peer: shm, 2 MiB": "the ring's memory ends at slots of 4 KiB"}


@pytest.mark.usefixtures("peer")
def test_one_that_refuses_costs_its_lane_only() -> None:
    result = bench.run(None, [4096], 5)
    assert [row.transport for row in result.rows] == ["cuda_ipc", "shm", "slow"]
    assert result.skipped == {"peer: nccl": "no NCCL here"}
    bench.complain(result, ["cuda_ipc", "slow"])
    with pytest.raises(TransportError, match="nccl cannot be measured: no NCCL here"):
        bench.complain(result, ["cuda_ipc", "nccl"])


@pytest.mark.usefixtures("peer")
def test_auto_says_why_it_takes_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "verified", lambda *_: False)
    monkeypatch.setattr(bench, "names", lambda: ["nccl", "shm", "cuda_ipc"])
    (auto,) = bench.run(["cuda_ipc"], [4096], 5).auto
    assert auto.name == ""
    for reason in ("nccl: no NCCL here", "shm: the bytes that arrived are not", "cuda_ipc: the bytes that arrived"):
        assert reason in auto.reasons["any"]


@pytest.mark.usefixtures("peer")
def test_auto_does_not_take_what_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "names", lambda: ["slow"])
    (auto,) = bench.run(["slow"], [4096, 8 * MIB], 5).auto
    assert auto.name == ""
    assert "8 MiB at " in auto.reasons["any"]
    assert "auto takes it from 1e+09 GB/s on" in auto.reasons["any"]


@pytest.mark.usefixtures("peer")
def test_when_the_time_is_up_the_rest_is_listed() -> None:
    result = bench.run(None, [4096, 8192], 5, budget_s=1e-6)
    assert result.rows == ()
    assert "the time was up" in result.skipped["peer: cuda_ipc, 4 KiB"]
    assert "the time was up" in result.skipped["peer: cuda_ipc, slowdown"]
    with pytest.raises(TransportError, match="shm cannot be measured: the time was up"):
        bench.complain(result, ["shm"])


@pytest.mark.gpu(1)
def test_one_gpu() -> None:
    result = bench.run(["inproc", "cuda_ipc", "shm", "bytes"], [4096, 4 * MIB], 5, devices="same")
    rows = by_lane(result)
    assert {name for name, _ in rows} == {"inproc", "cuda_ipc", "cuda_ipc borrow", "shm", "bytes"}
    assert all(row.verified for row in rows.values()), result
    assert rows["cuda_ipc", 4 * MIB].raw_kind == "device copy"
    assert rows["cuda_ipc borrow", 4 * MIB].ratio is None
    assert rows["shm", 4 * MIB].d2h_ratio
    assert [auto.name for auto in result.auto] == ["cuda_ipc"]
    assert {(one.transport, one.side) for one in result.slowdowns} == {("cuda_ipc", "daemon"), ("shm", "daemon")}


@pytest.mark.gpu(2)
def test_two_gpus() -> None:
    result = bench.run(["cuda_ipc", "nccl", "shm", "bytes"], [4096, 4 * MIB], 5, devices="peer")
    rows = by_lane(result)
    assert {name for name, _ in rows} == {"cuda_ipc", "nccl", "shm", "bytes"}
    assert all(row.verified for row in rows.values()), result
    assert (rows["cuda_ipc", 4096].raw_kind, rows["nccl", 4096].raw_kind) == ("peer copy", "ncclSend/Recv")
    assert len(result.slowdowns) == 6
