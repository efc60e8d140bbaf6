"""Hosts of the benchmark and the bytes they hold."""

from __future__ import annotations

import pytest

from specd.bench.transport.served import Patterns, Served
from specd.errors import TransportError


def test_device_memory_cannot_be_served_from_the_host() -> None:
    with pytest.raises(TransportError, match="cuda_ipc serves device memory only"):
        Served("cuda_ipc", "cpu", 1, 4096, Patterns())


def test_patterns_of_a_gpu_are_forgotten() -> None:
    patterns = Patterns()
    kept = patterns.expected(0, 100, "cpu")
    assert patterns.expected(0, 50, "cpu").data_ptr() == kept.data_ptr(), "the longest one is kept"
    patterns.forget("cuda:0")
    assert patterns.expected(0, 100, "cpu").data_ptr() == kept.data_ptr()
