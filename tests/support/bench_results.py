"""Made-up results of the transport benchmark, shaped like those of a machine with two GPUs."""

from __future__ import annotations

from typing import Any

from specd.bench.transport.result import Auto, Slowdown, TransportResult, TransportRow
from specd.bench.transport.sizes import LARGEST, SHAPES, SWEEP

LANES = (
    # placement, transport, mode, raw kind, ceiling in GB/s, fixed cost in µs, share of the ceiling reached
    ("peer", "cuda_ipc", "copy", "peer copy", 395.0, 12.0, 0.99),
    ("peer", "nccl", "copy", "ncclSend/Recv", 360.0, 60.0, 0.95),
    ("peer", "shm", "copy", "pinned H2D", 55.0, 16.0, 0.99),
    ("peer", "bytes", "copy", "pinned H2D", 55.0, 500.0, 0.05),
    ("same", "inproc", "copy", "device copy", 2080.0, 14.0, 0.97),
    ("same", "cuda_ipc", "copy", "device copy", 2080.0, 12.0, 0.98),
    ("same", "cuda_ipc", "borrow", "", 0.0, 4.0, 0.0),
    ("cpu", "shm", "copy", "host copy", 12.0, 20.0, 0.96),
    ("cpu", "bytes", "copy", "host copy", 12.0, 450.0, 0.2),
)
MACHINE: dict[str, Any] = {
    "cpu": "Example CPU 9000", "cores": 32, "load_1m": 0.5, "kernel": "6.8", "python": "3.12.3", "torch": "2.11.0",
    "pyzmq": "27.0", "libzmq": "4.3.5", "gpus": [{"name": "NVIDIA H200", "uuid": f"GPU-{i}"} for i in range(2)],
    "peer_access": True, "driver": "580.1", "cuda": "13.0", "nccl": "2.28.9", "nccl4py": "0.6.0",
    "cupy": "14.2 (cupy-cuda13x)", "commit": "0123456789abcdef", "copy_threads": 1,
}  # fmt: skip


def two_gpus() -> TransportResult:
    """A full run on two GPUs."""
    rows = tuple(
        row(*lane, size, shape)
        for lane in LANES
        for size, shape in [(size, "") for size in (*SWEEP, LARGEST)]
        + [(size, shape) for shape, size in SHAPES.items()]
        if lane[0] != "cpu" or size <= SWEEP[-1]
    )
    after = "not tried: it comes after cuda_ipc"
    return TransportResult(
        machine=MACHINE,
        budget_s=150.0,
        wall_s=141.3,
        auto=(
            auto("peer", "cuda:0", "cuda:1", "cuda_ipc", {"nixl": after, "nccl": after, "shm": after, "bytes": after}),
            auto("same", "cuda:0", "cuda:0", "cuda_ipc", {"nccl": after, "shm": after, "bytes": after}),
            auto("cpu", "cpu", "cpu", "bytes", {"shm": "no <shared> memory [here]"}),
        ),
        rows=rows,
        slowdowns=(slowdown("cuda_ipc", 0.031), slowdown("nccl", 0.22)),
        skipped={"same: nccl": "trainer and target share a GPU", "peer: nixl": "pip install 'specd-daemon[nixl]'"},
    )


def auto(placement: str, daemon: str, trainer: str, name: str, reasons: dict[str, str]) -> Auto:
    return Auto(placement=placement, daemon=daemon, trainer=trainer, name=name, reasons=reasons)


def slowdown(transport: str, share: float) -> Slowdown:
    return Slowdown(
        placement="peer", transport=transport, side="daemon", size_bytes=256 << 20, alone_tflop_per_s=678.0,
        during_tflop_per_s=678.0 * (1 - share), slowdown=share, gb_per_s=390.0, alone_spread=0.004,
    )  # fmt: skip


def row(
    placement: str, transport: str, mode: Any, raw_kind: str, ceiling: float, cost_us: float, share: float,
    size: int, shape: str = "",
) -> TransportRow:  # fmt: skip
    """A row whose time is a fixed cost and a share of the ceiling's bandwidth."""
    copied = mode == "copy"
    raw_us = 7 + size / ceiling / 1e3 if copied else None
    p50_us = cost_us + (size / ceiling / share / 1e3 if copied else 0.0)
    staged = transport == "shm" and placement != "cpu"
    return TransportRow(
        placement=placement, transport=transport, mode=mode, size_bytes=size, shape=shape, iterations=50,
        p50_us=p50_us, p99_us=1.4 * p50_us, min_us=0.95 * p50_us, p25_us=0.98 * p50_us, p75_us=1.05 * p50_us,
        gb_per_s=size / p50_us / 1e3 if copied else None,
        raw_kind=raw_kind, raw_p50_us=raw_us, raw_min_us=raw_us,
        raw_gb_per_s=size / raw_us / 1e3 if raw_us else None, ratio=raw_us / p50_us if raw_us else None,
        stream_gb_per_s=size / (p50_us - 0.3 * cost_us) / 1e3 if copied else None,
        stream_p25_gb_per_s=None, stream_p75_gb_per_s=None, stream_min_gb_per_s=None,
        stream_window=4 if copied else 0, stream_blocks=9 if copied else 0,
        raw_stream_gb_per_s=size / (2 + size / ceiling / 1e3) / 1e3 if copied else None,
        stream_ratio=0.97 if copied else None,
        d2h_gb_per_s=54.0 if staged else None, d2h_raw_gb_per_s=55.0 if staged else None,
        d2h_ratio=0.98 if staged else None,
        trainer_cpu_s_per_gb=0.003 if copied else None, daemon_cpu_s_per_gb=0.0 if copied else None,
        verified=True, setup_ms=3.2,
    )  # fmt: skip
