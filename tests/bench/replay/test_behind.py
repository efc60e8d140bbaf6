"""The replay tier behind a daemon: what its benchmark says of its rounds."""

from __future__ import annotations

from specd.bench.replay.behind import _interval


def test_an_interval_holds_the_median() -> None:
    low, high = _interval([0.97, 0.98, 0.99, 1.0, 1.01])
    assert 0.97 <= low < 0.99 < high <= 1.01
