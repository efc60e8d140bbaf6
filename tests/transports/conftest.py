"""Devices for transports' tests on a machine without any."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fake_cuda


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two stand-in devices, and nothing of them in use afterwards.

    Kernels, streams and the driver's own refusals are left to tests/system/test_gpu_transports.py.
    """
    fake_cuda.install(monkeypatch)
    yield
    assert not fake_cuda.registered, "page-locked memory is left"
