"""The transport benchmark on this machine: its rows, that `verified` is a finding, and what is left out and why."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest
import torch

from movers import Busy, Timed
from specd.bench.transport import lanes, load, timing
from specd.bench.transport import run as bench
from specd.bench.transport.lanes import DevicePair, Lane
from specd.bench.transport.result import TransportResult, TransportRow
from specd.bench.transport.row import OpenLane
from specd.bench.transport.served import Patterns, Served
from specd.bench.transport.wires import wire
from specd.errors import TransportError
from specd.transports.base import SlotRef
from specd.transports.inproc import Inproc
from specd.transports.shm import Shm, ShmClient

MIB = 1 << 20


@pytest.fixture(scope="module")
def result() -> TransportResult:
    return bench.run(["inproc", "shm", "bytes"], sizes=[1, 70_000], iterations=5, devices="cpu")


def test_result_has_the_promised_shape(result: TransportResult) -> None:
    assert msgspec.json.decode(msgspec.json.encode(result), type=TransportResult) == result
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


def test_what_auto_takes_between_processes_on_the_cpu(result: TransportResult) -> None:
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


def test_a_row_says_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "ring", lambda *_: (1, 4096))
    result = bench.run(["inproc"], [4096, 8192], 2, devices="cpu")
    assert [row.size_bytes for row in result.rows] == [4096]
    assert result.skipped == {"cpu: inproc, 8 KiB": "the ring's memory ends at slots of 4 KiB"}


def test_when_the_time_is_up_the_rest_is_listed() -> None:
    result = bench.run(["inproc"], [4096, 8192], 5, devices="cpu", budget_s=1e-6)
    assert result.rows == ()
    why = "the time was up (--budget-s 1e-06)"
    assert result.skipped == {"cpu: inproc, 4 KiB": why, "cpu: inproc, 8 KiB": why}
    with pytest.raises(TransportError, match="inproc cannot be measured: the time was up"):
        bench.complain(result, ["inproc"])


def test_only_what_was_named_is_complained_about(result: TransportResult) -> None:
    bench.complain(result, ["shm", "bytes"])
    skipped = msgspec.structs.replace(result, skipped={"peer: nccl": "no NCCL here", "same: nccl": "no NCCL here"})
    with pytest.raises(TransportError, match=r"^nccl cannot be measured: no NCCL here$"):
        bench.complain(skipped, ["shm", "nccl"])
    with pytest.raises(TransportError, match="nixl cannot be measured: no lane has it"):
        bench.complain(result, ["nixl"])


def test_the_gpu_of_each_side_is_loaded_beside_a_lane() -> None:
    found = {lane.title: bench.sides(lane) for lane in lanes.lanes(lanes.placements("all", 2), ["cuda_ipc", "shm"])}
    assert found == {
        "peer: cuda_ipc": ("daemon", "trainer"),
        "peer: shm": ("daemon", "trainer"),
        "same: cuda_ipc": ("daemon",),
        "same: cuda_ipc borrow": (),
        "cpu: cuda_ipc": (),
        "cpu: shm": (),
    }


class Shelved:
    """A shelf of known times: a raw copy takes 1 ms, the daemon's hop 2 ms, if it can be made."""

    def __init__(self, problem: str = "") -> None:
        self._problem = problem

    def staging(self) -> Timed:
        if self._problem:
            raise TransportError(self._problem)
        return Timed(2e-3)

    def to_host(self) -> Timed:
        return Timed(1e-3)


@pytest.fixture
def staged() -> Iterator[OpenLane]:
    """A lane whose daemon seems to have a GPU, and whose transport goes through host memory."""
    traits = msgspec.structs.replace(Inproc.traits, memory=frozenset({"host"}), scope="host")
    lane = Lane("shm", traits, DevicePair("peer", "cuda:0", "cpu"))
    patterns = Patterns()
    with contextlib.closing(Served("inproc", "cpu", 2, 4096, patterns)) as served, wire(served, lane, b"one") as link:
        served.transport = type("Staged", (Inproc,), {"traits": traits})
        yield OpenLane(lane, served, link, Timed(1e-3))


def measuring(lane: Lane, sizes: Sequence[int]) -> Any:
    budget = timing.Budget(60.0)
    return bench._Bench([lane], {lane.placement: [(size, "") for size in sizes]}, 3, budget, lambda what: None)


@pytest.mark.parametrize(
    ("problem", "hop", "skipped"),
    [("", 0.5, {}), ("no page-locked memory", None, {"peer: shm, its hop to the host": "no page-locked memory"})],
)
def test_a_hop_stands_in_its_row(staged: OpenLane, problem: str, hop: float | None, skipped: dict[str, str]) -> None:
    measured = measuring(staged.lane, [3000])
    measured._row(staged, Shelved(problem), 3000, "")
    (row,) = measured.rows
    assert (row.lane, row.size_bytes, row.d2h_ratio) == ("shm", 3000, hop)
    assert measured.skipped == skipped


def test_a_slowdown_is_measured_on_each_side(staged: OpenLane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "SEGMENT_S", 0.001)
    monkeypatch.setattr(load, "HostLoad", lambda host: Busy(100.0, 96.0, 100.0, 96.0, 100.0))
    monkeypatch.setattr(load, "Load", lambda device: Busy(100.0, 80.0, 100.0, 80.0, 100.0))
    measured = measuring(staged.lane, [3000])
    for side in bench.sides(staged.lane):
        measured._beside(staged, side)
    assert [(one.side, one.slowdown, one.size_bytes) for one in measured.slowdowns] == [
        ("daemon", 0.04, 4096), ("trainer", 0.2, 4096),
    ]  # fmt: skip


def by_lane(result: TransportResult) -> dict[tuple[str, int], TransportRow]:
    return {(row.lane, row.size_bytes): row for row in result.rows}


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
