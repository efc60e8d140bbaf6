"""One row of the transport benchmark: a size moved over a lane in turn with raw copies, then compared."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from specd.bench.transport import timing, wires
from specd.bench.transport.lanes import Lane
from specd.bench.transport.raw import Shelf
from specd.bench.transport.result import TransportRow
from specd.bench.transport.served import Patterns, Served
from specd.bench.transport.wires import Wire

LATENCY_SHARE: Final = 0.5
"""Of a row's time, for single transfers; the rest is for streams."""


class OpenLane(NamedTuple):
    """A lane with a session. raw: the copies it is held against, None for one that lends in place."""

    lane: Lane
    served: Served
    wire: Wire
    raw: timing.Mover | None


def measure(
    opened: OpenLane, patterns: Patterns, size: int, shape: str, allowance_s: float, iterations: int
) -> TransportRow:
    """Time one size, then compare what came. iterations: 0 for as many as `allowance_s` has room for."""
    lane, served, wire, raw = opened
    device, slots = lane.placement.trainer, served.num_slots if raw else 1
    wires.clear(wire, size, device)
    cpu, daemon_cpu, moved = wire.cpu_s, served.daemon_cpu_s(), wire.moved
    found = timing.latency(wire, raw, size, allowance_s * LATENCY_SHARE, iterations)
    stream = timing.NO_STREAM
    if raw is not None:
        rest = allowance_s * (1 - LATENCY_SHARE)
        stream = timing.streamed(wire, raw, size, slots, rest, iterations and 2)
    gigabytes = (wire.moved - moved) / 1e9
    spent, daemon_spent = wire.cpu_s - cpu, served.daemon_cpu_s() - daemon_cpu
    return TransportRow(
        placement=lane.placement.name,
        transport=lane.transport,
        mode="borrow" if lane.borrow else "copy",
        size_bytes=size,
        shape=shape,
        raw_kind=getattr(raw, "kind", ""),
        trainer_cpu_s_per_gb=round(spent / gigabytes, 4) if raw else None,
        daemon_cpu_s_per_gb=round(daemon_spent / gigabytes, 4) if raw else None,
        verified=wires.verified(wire, served, patterns, size, device, slots),
        setup_ms=round(wire.setup_ms, 3),
        **found,
        **stream,
        **timing.NO_HOP,
    )


def staged(opened: OpenLane) -> bool:
    """Whether the daemon copies a GPU's states to host memory, before READY, so that no latency counts it.

    The copy is the same for every transport of host memory; it is measured for those that a trainer pulls from.
    """
    traits = opened.served.transport.traits
    return opened.lane.placement.daemon != "cpu" and traits.one_sided and "device" not in traits.memory


def hop(shelf: Shelf, size: int, allowance_s: float, iterations: int) -> dict[str, Any]:
    """The fields of a row for that copy. Raises TransportError when it cannot be made."""
    staging, plain = shelf.staging(), shelf.to_host()
    return timing.hop(staging, plain, size, allowance_s * LATENCY_SHARE, iterations)
