"""Whether keeping states over epochs pays: what fits, what it saves, and how long epochs take, from rates alone.

A daemon reads what it has kept beside the forwards of the rest, so an epoch takes the longest of four: forwards of what
does not fit, reads of what does, the drafts and the wires. Nothing is saved in the first epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import msgspec

from specd.errors import ConfigError
from specd.plan.balance import EVEN, Placement, Work
from specd.units import duration


class Store(msgspec.Struct, frozen=True, kw_only=True):
    """What each daemon keeps states in: 10⁹ bytes of it, and how many of them it reads a second."""

    gb: float
    disk_gb_per_s: float


class Saving(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of `saving`, for all daemons of a placement.

    held: part of an epoch's states that fits. saved: part of the training's forwards that is not made.
    break_even_gb_per_s: with it a daemon reads states as fast as its target makes them. balanced_gb: as much as each
    daemon reads in the time that it computes the rest. first_s, later_s: seconds of the first epoch, and of each later
    one. hours, hours_without: of the whole training. write_gb_per_s: what each daemon would write in the first epoch.
    outcome: whether time is saved, forwards alone, or none of them. why: in words, the decisive one first.
    """

    placement: str
    held: float
    saved: float
    break_even_gb_per_s: float
    balanced_gb: float
    first_s: float
    later_s: float
    hours: float
    hours_without: float
    write_gb_per_s: float
    outcome: Literal["pays", "saves forwards alone", "does not pay"]
    why: tuple[str, ...]


def saving(work: Work, placement: Placement, store: Store) -> Saving:
    """What a store in each daemon of a placement saves. work: with its samples, and more than one epoch.

    Raises ConfigError for sizes and rates out of range, or that are missing.
    """
    _check(work, store)
    daemons, trainers = placement.daemons, placement.trainers
    tokens = work.samples * (work.tokens_per_sample or work.batch_tokens)
    nbytes = tokens * work.bytes_per_token
    held = min(1.0, daemons * store.gb * 1e9 / nbytes)
    computed_s = tokens / (daemons * work.target_tokens_per_s)
    read_s = nbytes / (daemons * store.disk_gb_per_s * 1e9)
    draft_s = tokens / (trainers * work.draft_tokens_per_s)
    wire_s = nbytes / (trainers * work.wire_gb_per_s * 1e9) if work.wire_gb_per_s else 0.0
    first_s = tokens / work.batch_tokens * placement.batch_s
    later_s = max((1 - held) * computed_s, held * read_s, draft_s, wire_s) / work.efficiency
    outcome: Literal["pays", "saves forwards alone", "does not pay"] = "saves forwards alone"
    if abs(first_s / later_s - 1) > EVEN:
        outcome = "pays" if later_s < first_s else "does not pay"
    found = Saving(
        placement=placement.name,
        held=held,
        saved=held * (work.epochs - 1) / work.epochs,
        break_even_gb_per_s=work.bytes_per_token * work.target_tokens_per_s / 1e9,
        balanced_gb=nbytes / daemons / 1e9 * computed_s / (computed_s + read_s),
        first_s=first_s,
        later_s=later_s,
        hours=(first_s + (work.epochs - 1) * later_s) / 3600,
        hours_without=work.epochs * first_s / 3600,
        write_gb_per_s=held * nbytes / daemons / first_s / 1e9,
        outcome=outcome,
        why=(),
    )
    slower = "wires are" if wire_s > draft_s else "drafts are"
    return msgspec.structs.replace(found, why=tuple(_why(found, store, nbytes / daemons / 1e9, slower)))


def _why(found: Saving, store: Store, epoch_gb: float, slower: str) -> Iterator[str]:
    """The outcome's reasons. epoch_gb: of each daemon. slower: who needs as long as the first epoch takes."""
    disk, even = store.disk_gb_per_s, found.break_even_gb_per_s
    first, later = duration(found.first_s), duration(found.later_s)
    if found.outcome == "does not pay":
        yield (
            f"later epochs take {later}, the first {first}: recompute is {even / disk:.1f} × faster than {disk:g} "
            f"GB/s; take a faster disk, or keep at most {found.balanced_gb:,.0f} GB in each daemon, which are read "
            f"while the rest is computed"
        )
    elif found.outcome == "pays":
        yield (
            f"later epochs take {later} in place of {first}, {found.first_s / found.later_s:.2f} × faster, and "
            f"{found.saved:.0%} of all forwards are not made"
        )
    else:
        yield (
            f"epochs are no faster, as the {slower} what they wait for; {found.saved:.0%} of all forwards are not "
            f"made, so the daemons' GPUs have time for other trainers, or fewer of them are enough"
        )
    if found.held < 1:
        yield (
            f"{store.gb:,.0f} GB hold {found.held:.0%} of the {epoch_gb:,.0f} GB that an epoch has for each daemon; "
            f"every later epoch replays the same part"
        )
    else:
        yield (
            f"all {epoch_gb:,.0f} GB that an epoch has for each daemon fit: from the second epoch on the target "
            f"computes nothing, and its GPUs are free"
        )
    if found.outcome != "does not pay" and disk < even:
        yield (
            f"a target makes {even:.2g} GB/s of states and its disk reads {disk:g}: it pays only as both go on at once"
        )
    if found.write_gb_per_s > disk:
        yield (
            f"the first epoch has {found.write_gb_per_s:.2g} GB/s to write in each daemon, and a disk that takes "
            f"{disk:g}: the rest is skipped, and tried again in the next epoch"
        )
    yield "for trainings with data.packing=fixed: else every epoch has other batches, and nothing is replayed"


def _check(work: Work, store: Store) -> None:
    for name, value in (("replay-gb", store.gb), ("disk-gb-s", store.disk_gb_per_s)):
        if not math.isfinite(value) or value <= 0:
            raise ConfigError(f"--{name} {value:g}: expected a number, more than 0")
    if not work.samples:
        raise ConfigError(
            "--replay-gb without the size of the data: what part of it fits cannot be told; give --samples, and "
            "--tokens-per-sample, or --from with a run"
        )
    if work.epochs <= 1:
        raise ConfigError(
            f"--replay-gb with --epochs {work.epochs:g}: the first epoch replays nothing, expected more than 1; give "
            f"--epochs"
        )
