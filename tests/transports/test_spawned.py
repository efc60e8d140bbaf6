"""Hosts in a process of their own: the calls of the suite that cross a process border, starts that fail."""

from __future__ import annotations

import pytest

from specd.errors import TransportError
from specd.transports.registry import load
from specd.transports.testing.rig import Rig
from specd.transports.testing.spawned import SpawnedHost
from specd.transports.testing.suite import TransportConformance


@pytest.mark.parametrize("name", ["shm", "bytes"])
def test_from_another_process(name: str) -> None:
    """The calls of the suite that matter across a process border, with one child for all of them."""
    suite = TransportConformance()
    rig = Rig(load(name), "cpu", SpawnedHost(name, suite.num_slots, suite.slot_bytes))
    suite.transport = rig.transport  # type: ignore[misc]
    try:
        suite.test_bytes_are_exact_at_every_size(rig)
        suite.test_a_refill_under_way_is_noticed(rig)
        suite.test_two_sessions_do_not_disturb_each_other(rig)
        suite.test_garbage_is_refused(rig)
        suite.test_a_dropped_session_gets_nothing(rig)
    finally:
        rig.close()


def test_a_host_that_cannot_start_says_why() -> None:
    with pytest.raises(TransportError, match="unknown transport"):
        SpawnedHost("carrier-pigeon", 1, 4096)
