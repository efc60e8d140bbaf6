"""The lanes' benchmark on the CPU: every slot is kept and read, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from specd.bench.replay.lanes import rows
from specd.errors import ConfigError


def test_each_tier_is_measured_and_the_disk_given_back(tmp_path: Path) -> None:
    found = list(rows("cpu", tmp_path, slot_bytes=65536, disk=2 * 10**6, memory=10**6, asked=1.0))
    assert [row.tier for row in found] == ["memory", "disk"]
    for row in found:
        assert row.slots >= 15 - (row.tier == "disk") * 15 * row.skipped
        assert min(row.write, row.read, row.read_ms, row.raw_write, row.raw_read) > 0
        assert 0 <= row.skipped <= 1
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_what_a_daemon_could_not_start_with_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no room for one batch"):
        list(rows("cpu", tmp_path, slot_bytes=65536, disk=1000, memory=0, asked=1.0))
