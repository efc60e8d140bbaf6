"""On GPUs: trainers that share forwards get the bytes of separate runs, and a cut costs little beside a plain pull."""

from __future__ import annotations

import importlib.util
import threading
import time
from functools import partial

import pytest
import torch

from members import SPECS, follow, own_process, together
from specd.client.ask import ask_status
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec
from specd.protocol.cut import cut, gather
from specd.transports.base import SlotRef
from specd.transports.checks import pattern
from specd.transports.registry import load
from specd.transports.testing.rig import Rig
from specd.transports.testing.spawned import SpawnedHost

HIDDEN, TOKENS = 4096, 4096
LEAST = 0.8
"""Of the rate of a contiguous pull of as many bytes."""


installed = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl_cu13", "nixl_cu12")),
    reason="needs NIXL: pip install --no-deps nixl-cu13",
)


@pytest.mark.parametrize(
    ("transport", "device"),
    [
        pytest.param("cuda_ipc", "cuda:0", marks=pytest.mark.gpu(1)),
        pytest.param("shm", "cuda:0", marks=pytest.mark.gpu(1)),
        pytest.param("bytes", "cuda:0", marks=pytest.mark.gpu(1)),
        pytest.param("nixl", "cuda:0", marks=[pytest.mark.gpu(1), installed]),
        pytest.param("nccl", "cuda:1", marks=pytest.mark.gpu(2)),
    ],
)
def test_three_specs_get_the_bytes_of_separate_runs_on_a_gpu(transport: str, device: str) -> None:
    count = 20
    with own_process("--device", "cuda:0", "--transports", transport) as daemon:
        stream = partial(follow, daemon, transport, device=device)
        alone = [stream(spec, count).digests for spec in SPECS]
        meet = threading.Barrier(len(SPECS))
        shared = together([partial(stream, spec, count, share="s", meet=meet) for spec in SPECS])
    assert [one.digests for one in shared] == alone
    assert sum(one.stats.shared for one in shared) >= 1.5 * count


@pytest.mark.gpu(1)
def test_members_that_borrow_get_the_bytes_of_separate_runs() -> None:
    """Final states are read where they lie, taps among others are copied."""
    count = 20
    with own_process("--device", "cuda:0", "--transports", "cuda_ipc") as daemon:
        stream = partial(follow, daemon, "cuda_ipc", device="cuda:0")
        alone = [stream(spec, count).digests for spec in SPECS]
        meet = threading.Barrier(len(SPECS))
        shared = together([partial(stream, spec, count, share="s", borrow=True, meet=meet) for spec in SPECS])
    assert [one.digests for one in shared] == alone
    assert sum(one.stats.shared for one in shared) >= 1.5 * count


@pytest.mark.gpu(1)
def test_one_that_was_stopped_for_3_s_reads_what_the_other_passed_on_a_gpu() -> None:
    """From page-locked memory, into the ring on the GPU."""
    count, meet = 200, threading.Barrier(2)
    with own_process("--device", "cuda:0", "--transports", "cuda_ipc", "--lag-gb", "0.05") as daemon:
        stream = partial(follow, daemon, "cuda_ipc", device="cuda:0")
        alone = [stream(spec, count).digests for spec in SPECS[:2]]
        before = ask_status(daemon, 10).counters
        found = together([
            partial(stream, spec, count, share="s", step_s=0.03, meet=meet, pause_s=pause_s)
            for spec, pause_s in zip(SPECS, (0.0, 3.0), strict=False)
        ])  # fmt: skip
        counters = ask_status(daemon, 10).counters
    assert [one.digests for one in found] == alone
    assert counters["lag_hits"] >= 30
    assert counters["fills"] - before["fills"] <= 0.6 * 2 * count


@pytest.mark.parametrize(
    ("transport", "served", "least"),
    [
        pytest.param("cuda_ipc", "cuda:0", LEAST, marks=pytest.mark.gpu(1)),
        pytest.param("nixl", "cuda:0", 0.0, marks=[pytest.mark.gpu(1), installed]),
        pytest.param("nccl", "cuda:1", 0.0, marks=pytest.mark.gpu(2)),
    ],
)
def test_a_cut_beside_a_plain_pull(
    transport: str, served: str, least: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five of eight taps. least: of the rate of a plain pull; where it is 0, the figures are only printed."""
    held, own = CaptureSpec(taps=tuple(range(8))), CaptureSpec(taps=(0, 2, 3, 5, 7))
    whole, part = (slot_layout(spec, HIDDEN, TOKENS).nbytes for spec in (held, own))
    host = SpawnedHost(transport, 1, whole, device=served)
    rig = Rig(load(transport), "cuda:0", host)
    try:
        client, into = rig.attach(), rig.destination(part)
        host.fill(0, 1, b"cut", whole)
        refs = {"plain": SlotRef(0, 1, part), "cut": SlotRef(0, 1, part, cut(held, own, HIDDEN, TOKENS))}
        took: dict[str, list[float]] = {name: [] for name in refs}
        for _ in range(30):
            for name, ref in refs.items():
                begin = time.monotonic()
                rig.publish(b"one", ref)
                client.fetch(ref, into, 20.0)
                took[name].append(time.monotonic() - begin)
        torch.cuda.synchronize()
        expected = gather(pattern(b"cut", whole).data, refs["cut"].pieces, 0, part)
        assert torch.equal(into[:part].cpu(), torch.frombuffer(expected, dtype=torch.uint8))
    finally:
        rig.close()
        host.end()
    rates = {name: part / sorted(times)[len(times) // 2] / 1e9 for name, times in took.items()}
    with capsys.disabled():
        figures = ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in rates.items())
        print(f"{transport}, {part / 2**20:.0f} MiB: {figures}")
    assert rates["cut"] >= least * rates["plain"]
