"""What transfers cost a neighbour on the GPU: alone against during, and a load that never outlives a failure."""

from __future__ import annotations

from typing import Any

import pytest

from movers import Busy, Timed
from specd.bench.transport import load
from specd.errors import TransportError
from specd.transports.registry import known

MIB = 1 << 20


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "SEGMENT_S", 0.001)


def test_a_slowdown_is_alone_against_during_in_turn() -> None:
    busy: Any = Busy(680.0, 640.0, 670.0, 646.0, 690.0)
    found = load.slowdown(busy, Timed(2e-3), 1_000_000)
    assert (found["alone_tflop_per_s"], found["during_tflop_per_s"]) == (680, 643)
    assert found["slowdown"] == pytest.approx(1 - 643 / 680, abs=1e-4)
    assert found["alone_spread"] == pytest.approx(20 / 680, abs=1e-4)
    assert (found["gb_per_s"], found["size_bytes"]) == (1.0, 1_000_000)


def test_a_load_that_fails_is_stopped() -> None:
    class Broken(Timed):
        def stream(self, nbytes: int, count: int) -> float:
            if busy.running:
                raise TransportError("the daemon is gone")
            return 1.0

    busy: Any = Busy(1.0, 1.0)
    with pytest.raises(TransportError, match="gone"):
        load.slowdown(busy, Broken(1.0), MIB)
    assert not busy.running


def test_transports_that_a_gpu_feels_are_those_that_it_moves() -> None:
    loads = {name: load.loads_a_gpu(traits) for name, traits in known(()).items()}
    assert loads == {"inproc": False, "shm": True, "bytes": False, "cuda_ipc": True, "nccl": True, "nixl": True}
