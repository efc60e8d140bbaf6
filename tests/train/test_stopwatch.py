"""The stopwatch: what it counts, on the CPU and on a GPU."""

from __future__ import annotations

import time

import pytest
import torch

from specd.train.stopwatch import Stopwatch


def test_pieces_add_up_without_gaps_and_failures() -> None:
    watch = Stopwatch("cpu")
    begin = time.perf_counter()
    for _ in range(2):
        with watch.running():
            time.sleep(0.05)
        time.sleep(0.1)
    whole = time.perf_counter() - begin
    with pytest.raises(ValueError, match="failed"), watch.running():
        raise ValueError("failed")
    assert 0.1 <= watch.seconds() <= whole - 0.2


@pytest.mark.gpu(1)
def test_on_a_gpu_device_time_counts_and_not_launch_time() -> None:
    watch = Stopwatch("cuda:0")
    torch.zeros(1, device="cuda:0")
    torch.cuda.synchronize(0)
    begin = time.monotonic()
    with watch.running():
        torch.cuda._sleep(1_000_000_000)  # type: ignore[no-untyped-call]
    launched = time.monotonic() - begin
    torch.cuda.synchronize(0)
    assert launched < watch.seconds() <= time.monotonic() - begin
