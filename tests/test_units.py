"""Sizes and times as people read them."""

from __future__ import annotations

import pytest

from specd import units


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (4096, "4 KiB"), (62_914_560, "60 MiB"), (1_500_001, "1.4 MiB"),
     (1 << 30, "1 GiB"), (3 << 40, "3 TiB"), (5 << 50, "5120 TiB")],
)  # fmt: skip
def test_sizes(nbytes: int, text: str) -> None:
    assert units.size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 µs"), (4.04e-6, "4.04 µs"), (46.44e-6, "46.4 µs"), (0.000_999_6, "1 ms"), (0.0023104, "2.31 ms"),
     (0.0075, "7.5 ms"), (0.0801, "80.1 ms"), (0.9994, "999 ms"), (0.9996, "1.0 s"), (59.2, "59.2 s"),
     (80, "1 min 20 s"), (11100, "3 h 05 min")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text
