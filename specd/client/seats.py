"""Seats: which daemons a rank of a run takes its batches from, how many ranks come to each, and what its ring lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from specd.endpoints import is_far, is_here
from specd.protocol.batch import slot_bytes
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import RingInfo


class Seat(NamedTuple):
    """Where a rank sits in its run. local_rank of local_ranks: among those on its host."""

    rank: int
    local_rank: int
    local_ranks: int


class Role(NamedTuple):
    """What one daemon is to one rank. ranks: how many come to it, as far as this one knows; at least 1.

    standby: it is asked only while none of the others is up.
    """

    ranks: int = 1
    standby: bool = False


def roles(endpoints: Sequence[str], ranks: int, seat: Seat | None, *, near: bool) -> list[Role]:
    """The role of each endpoint for one of `ranks`.

    near: a rank takes the daemons on its own host, or all if there are none, and shares them evenly with those who take
    the same: every daemon serves its part of the ranks, or every rank has its part of the daemons. The rest stand by.
    Without a seat all are taken.
    """
    here = [place for place, endpoint in enumerate(endpoints) if seat is not None and is_here(endpoint)]
    if seat is None or not near or ranks == 1:
        private = [not is_far(endpoint) for endpoint in endpoints]
        local = seat.local_ranks if seat is not None else ranks
        return [Role(_reach(end, local if mine else ranks)) for end, mine in zip(endpoints, private, strict=True)]
    shared, index, count = here, seat.local_rank, seat.local_ranks
    if not here:
        shared, index, count = list(range(len(endpoints))), seat.rank, ranks
    own = share(len(shared), index, count)
    come = [sum(place in share(len(shared), each, count) for each in range(count)) for place in range(len(shared))]
    found = [Role(standby=True) for _ in endpoints]
    for order, place in enumerate(shared):
        found[place] = Role(_reach(endpoints[place], max(1, come[order])), standby=order not in own)
    return found


def share(size: int, index: int, count: int) -> range:
    """Which of `size` things the one at `index` of `count` takes: its part, or the one that it shares with others."""
    if size < count:
        first = index * size // count
        return range(first, first + 1)
    return range(index * size // count, (index + 1) * size // count)


def thin(num_slots: int, pool: int, wanted: int, ranks: int) -> str:
    """What is wrong with a ring for ranks that want so many credits each, empty if nothing. pool: its shared slots."""
    if pool >= ranks * (wanted - 1):
        return ""
    depth = pool // ranks
    served = "a trainer" if ranks == 1 else f"{ranks} ranks"
    return (
        f"credits {depth + 1} of {wanted} wanted: a ring of {num_slots} slots serves {served} at depth {depth}; specd "
        f"start … --trainers {ranks} --depth {wanted - 1} ({ranks * wanted} slots)"
    )


def narrow(ring: RingInfo, spec: CaptureSpec, hidden_size: int, longest: int) -> tuple[list[str], list[str]]:
    """What is wrong with slots for batches of up to `longest` tokens, and the settings of a daemon that mend it.

    Both empty if nothing is.
    """
    problems: list[str] = []
    remedy: list[str] = []
    if slot_bytes(spec, hidden_size, ring.slot_tokens) > ring.slot_bytes:
        need, have = spec.bytes_per_token(hidden_size), ring.slot_bytes // ring.slot_tokens
        problems.append(f"{spec.title} = {need:,} bytes a token, where slots hold {have:,}")
        remedy += spec.sizing
    if longest > ring.slot_tokens:
        problems.append(f"batches of {longest:,} tokens, where a slot has {ring.slot_tokens:,}")
        remedy.append(f"ring.slot_tokens={longest}")
    return problems, remedy


def _reach(endpoint: str, ranks: int) -> int:
    """How many of `ranks` can reach a daemon: one within its process is its own rank's alone."""
    return 1 if endpoint.startswith("inproc://") else ranks
