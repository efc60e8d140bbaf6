"""Hosts of a run: started once, shared by lanes, closed in the end, and errors that wait for who asks."""

from __future__ import annotations

import pytest

from specd.bench.transport.hosts import Hosts
from specd.bench.transport.served import Patterns
from specd.errors import TransportError


def test_a_host_is_started_once_and_closed_in_the_end() -> None:
    done: list[str] = []
    with Hosts(Patterns()) as hosts:
        hosts.start({("inproc", "cpu"): [100, 4096]}, [lambda: done.append("beside")])
        assert done == ["beside"]
        served = hosts.get(("inproc", "cpu"), [1 << 20])
        assert (served.num_slots, served.slot_bytes) == (4, 4096)
        assert hosts.get(("inproc", "cpu"), []) is served
    with pytest.raises(TransportError):
        served.host.accept(b"late", b"hello")


def test_one_that_does_not_start_says_why_each_time() -> None:
    with Hosts(Patterns()) as hosts:
        hosts.start({("pigeon", "cpu"): [4096]})
        for key in (("pigeon", "cpu"), ("owl", "cpu")):
            for _ in range(2):
                with pytest.raises(TransportError, match=f"unknown transport '{key[0]}'"):
                    hosts.get(key, [4096])
