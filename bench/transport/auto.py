"""Which transport `auto` takes between two processes, by a subscriber's own test, and why no other one."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from specd.bench.transport import wires
from specd.bench.transport.hosts import Hosts
from specd.bench.transport.lanes import DevicePair, Lane
from specd.bench.transport.result import Auto
from specd.bench.transport.served import Patterns
from specd.client.handshake import LEAST_TIMED_BYTES, PROBE_BYTES, TIMED_BYTES, too_slow
from specd.errors import TransportError
from specd.transports.base import Traits
from specd.transports.registry import choose, preferred


def pick(placement: DevicePair, traits: Mapping[str, Traits], hosts: Hosts, patterns: Patterns) -> Auto:
    """What `auto` takes of these transports."""

    def tried(name: str) -> str | None:
        try:
            return probe(name, placement, hosts, patterns)
        except RuntimeError as error:  # the driver's or torch's
            return f"{type(error).__name__}: {error}"

    try:
        choice = choose("auto", list(traits), traits, False, placement.trainer, tried)
        reasons = dict(choice.reasons)
        for name in preferred(traits, placement.trainer):
            if name != choice.name and name not in reasons:
                reasons[name] = f"not tried: it comes after {choice.name}"
        taken = choice.name
    except TransportError as error:
        taken, reasons = "", {"any": str(error)}
    return Auto(
        placement=placement.name, daemon=placement.daemon, trainer=placement.trainer, name=taken, reasons=reasons
    )


def probe(name: str, placement: DevicePair, hosts: Hosts, patterns: Patterns) -> str | None:
    """Why `auto` would not take a transport: not served, wrong bytes, or slower than its floor; None if it would.

    Raises TransportError where the attempt fails.
    """
    served = hosts.get((name, placement.daemon), [TIMED_BYTES])
    if reason := served.transport.available(placement.daemon):
        return reason  # a daemon serves it only where it is named
    floor, small = served.transport.traits.floor_gb_s, min(PROBE_BYTES, served.slot_bytes)
    large = min(TIMED_BYTES, served.slot_bytes)
    with wires.wire(served, Lane(name, served.transport.traits, placement), secrets.token_bytes(8), 1, large) as wire:
        wires.clear(wire, large, placement.trainer)
        wire.one(small)
        if not wires.verified(wire, served, patterns, small, placement.trainer, 1):
            return "the bytes that arrived are not the ones that were sent"
        if not floor or large < LEAST_TIMED_BYTES:
            return None
        return too_slow(wire.one, large, floor)
