"""What `auto` takes: right bytes at a rate above the floor, else the next one, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import msgspec
import pytest

from specd.bench.transport import auto
from specd.bench.transport.hosts import Hosts
from specd.bench.transport.lanes import placements
from specd.bench.transport.result import Auto
from specd.bench.transport.served import Patterns
from specd.transports.base import Traits
from specd.transports.inproc import Inproc

CPU = placements("cpu", 0)[0]
PATTERNS = Patterns()
HOST = msgspec.structs.replace(Inproc.traits, scope="host", memory=frozenset({"host"}), rank=1)


class Slow(Inproc):
    """One that does not reach the floor it gives itself."""

    traits: ClassVar[Traits] = msgspec.structs.replace(Inproc.traits, floor_gb_s=1e9)


class Unserved(Inproc):
    @staticmethod
    def available(device: str) -> str:  # type: ignore[override]  # inproc always is
        return f"no carrier on {device}"


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Serves `inproc` alone."""
    with Hosts(PATTERNS) as found:
        yield found


def pick(hosts: Hosts, patterns: Patterns = PATTERNS, **traits: Traits) -> Auto:
    return auto.pick(CPU, traits, hosts, patterns)


def test_the_first_that_works_is_taken_and_the_others_say_why_not(hosts: Hosts) -> None:
    later = msgspec.structs.replace(HOST, rank=9)
    found = pick(hosts, pigeon=msgspec.structs.replace(HOST, rank=0), inproc=HOST, owl=later)
    assert (found.name, found.placement, found.daemon, found.trainer) == ("inproc", "cpu", "cpu", "cpu")
    assert "unknown transport 'pigeon'" in found.reasons["pigeon"]
    assert found.reasons["owl"] == "not tried: it comes after inproc"


def test_wrong_bytes_are_not_taken(hosts: Hosts) -> None:
    found = pick(hosts, Patterns(), inproc=HOST)
    assert found.name == ""
    assert "inproc: the bytes that arrived are not the ones that were sent" in found.reasons["any"]


@pytest.mark.parametrize(
    ("kind", "reason"), [(Slow, "auto takes it from 1e+09 GB/s on"), (Unserved, "no carrier on cpu")]
)
def test_what_is_slow_or_not_served_is_not_taken(hosts: Hosts, kind: type[Inproc], reason: str) -> None:
    served = hosts.get(("inproc", "cpu"), [8 << 20])
    served.transport = kind
    found = pick(hosts, inproc=HOST)
    assert found.name == ""
    assert reason in found.reasons["any"]


def test_an_error_of_the_driver_is_a_reason(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(auto, "probe", fail)
    assert "RuntimeError: out of memory" in pick(hosts, inproc=HOST).reasons["any"]
