"""On GPUs: trainers that share forwards get the bytes of separate runs, and a cut costs little beside a plain pull."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest
import torch

from members import SPECS, follow, own_process, together
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec
from specd.protocol.cut import cut
from specd.transports.base import SlotRef
from specd.transports.registry import load
from specd.transports.testing.rig import Rig
from specd.transports.testing.spawned import SpawnedHost

HIDDEN, TOKENS = 4096, 4096
LEAST = 0.8
"""Of the rate of a contiguous pull of as many bytes."""


@pytest.mark.gpu(1)
@pytest.mark.parametrize("transport", ["cuda_ipc", "shm", "bytes"])
def test_three_specs_get_the_bytes_of_separate_runs_on_a_gpu(transport: str) -> None:
    count, device = 20, "cuda:0"
    with own_process("--device", device, "--transports", transport) as daemon:
        stream = partial(follow, daemon, transport, device=device)
        alone = [stream(spec, count).digests for spec in SPECS]
        meet = threading.Barrier(len(SPECS))
        shared = together([partial(stream, spec, count, share="s", meet=meet) for spec in SPECS])
    assert [one.digests for one in shared] == alone
    assert sum(one.stats.shared for one in shared) >= 1.5 * count


@pytest.mark.gpu(1)
def test_a_cut_is_nearly_as_fast_as_a_plain_pull(capsys: pytest.CaptureFixture[str]) -> None:
    """Five of eight taps, over cuda_ipc on one GPU."""
    held, own = CaptureSpec(taps=tuple(range(8))), CaptureSpec(taps=(0, 2, 3, 5, 7))
    whole, part = (slot_layout(spec, HIDDEN, TOKENS).nbytes for spec in (held, own))
    host = SpawnedHost("cuda_ipc", 1, whole, device="cuda:0")
    rig = Rig(load("cuda_ipc"), "cuda:0", host)
    try:
        client, into = rig.attach(), rig.destination(part)
        host.fill(0, 1, b"cut", whole)
        refs = {"plain": SlotRef(0, 1, part), "cut": SlotRef(0, 1, part, cut(held, own, HIDDEN, TOKENS))}
        took: dict[str, list[float]] = {name: [] for name in refs}
        for _ in range(30):
            for name, ref in refs.items():
                begin = time.monotonic()
                client.fetch(ref, into, 20.0)
                took[name].append(time.monotonic() - begin)
        torch.cuda.synchronize()
    finally:
        rig.close()
        host.end()
    rates = {name: part / sorted(times)[len(times) // 2] / 1e9 for name, times in took.items()}
    with capsys.disabled():
        print(
            f"cuda_ipc, {part / 2**20:.0f} MiB: {', '.join(f'{name} {rate:.0f} GB/s' for name, rate in rates.items())}"
        )
    assert rates["cut"] >= LEAST * rates["plain"]
