"""The load that stands for a target: it ends when told, and says what went wrong."""

from __future__ import annotations

import pytest

import fake_cuda
from specd.bench.transport.matmuls import MatmulLoad
from specd.errors import TransportError


def test_a_load_needs_a_gpu() -> None:
    with pytest.raises(TransportError, match="cpu has no CUDA memory"):
        MatmulLoad("cpu")


def test_a_load_that_breaks_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)

    def multiply(self: MatmulLoad) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(MatmulLoad, "_multiply", multiply)
    with pytest.raises(TransportError, match="the load on cuda:0 failed: out of memory"):
        MatmulLoad("cuda")


def test_a_load_reports_what_it_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)

    def multiply(self: MatmulLoad) -> None:
        self._running.set()
        self._ending.wait()
        self._rate = 12.5

    monkeypatch.setattr(MatmulLoad, "_multiply", multiply)
    assert MatmulLoad("cuda:0").stop() == 12.5


@pytest.mark.gpu(1)
def test_a_gpu_multiplies_until_it_is_stopped() -> None:
    assert MatmulLoad("cuda:0").stop() > 1
