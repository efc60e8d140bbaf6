"""Watching daemons: all are asked at once, and one that does not answer holds up nobody."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from daemons import REPORT, answering
from specd.client.watch import Watch
from specd.errors import ConfigError


def test_daemons_are_read_again_and_again_beside_one_that_is_not_there(tmp_path: Path) -> None:
    one, two, none = (f"ipc://{tmp_path}/{name}.sock" for name in ("one", "two", "none"))
    other = msgspec.structs.replace(REPORT, pid=7)
    with answering(one, REPORT), answering(two, other), Watch([one, none, two]) as watch:
        for _ in range(3):
            found = watch.read(20)
            assert [reading.endpoint for reading in found] == [one, none, two]
            assert [reading.report for reading in found] == [REPORT, None, other]
            assert found[1].problem == "no daemon answers"
            assert not found[0].problem


def test_a_daemon_that_comes_later_and_goes_is_seen(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/d.sock"
    with Watch([endpoint]) as watch:
        assert watch.read(20)[0].report is None
        with answering(endpoint, REPORT):
            until = time.monotonic() + 20
            while (said := watch.read(0.2)[0].report) is None:
                assert time.monotonic() < until
            assert said == REPORT
        assert watch.read(0.2)[0].report is None


def test_an_endpoint_that_is_none_is_refused_whatever_else_is_watched(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected ipc://PATH or tcp://HOST:PORT"):
        Watch([f"ipc://{tmp_path}/d.sock", "gpu1:7070"])
