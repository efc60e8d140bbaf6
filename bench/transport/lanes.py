"""Lanes: every transport on every pair of devices here, and how large a ring each may have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final, NamedTuple

from specd.errors import ConfigError, TransportError
from specd.transports.base import Traits
from specd.transports.registry import load

MIB: Final = 1 << 20
WINDOW: Final = 4
"""Slots that are announced ahead in a stream, as a subscriber of depth 4 has them."""
RING_BYTES: Final = {"cpu": 512 * MIB, "cuda": 4096 * MIB}
"""A ring has fewer slots than WINDOW before it gets larger than this."""


class DevicePair(NamedTuple):
    """A placement: the device that holds the daemon's states, and the one where the trainer wants them."""

    name: str
    daemon: str
    trainer: str

    @property
    def title(self) -> str:
        if self.daemon == "cpu" and self.trainer == "cpu":
            return "host memory to host memory"
        where = "the same GPU" if self.daemon == self.trainer else "a peer GPU"
        return f"{self.daemon} to {self.trainer}, {where}"


class Lane(NamedTuple):
    """One transport on one placement. traits: None for one that cannot be loaded. borrow: lent in place, not copied."""

    transport: str
    traits: Traits | None
    placement: DevicePair
    borrow: bool = False

    @property
    def title(self) -> str:
        return f"{self.placement.name}: {self.transport}{' borrow' if self.borrow else ''}"


def placements(asked: str, num_gpus: int) -> list[DevicePair]:
    """What can be measured with this many GPUs, what matters most first.

    asked: `cpu`, `same`, `peer`, or `all` for everything that is here. Raises ConfigError when it is not.
    """
    known = {
        "peer": (2, DevicePair("peer", "cuda:0", "cuda:1")),
        "same": (1, DevicePair("same", "cuda:0", "cuda:0")),
        "cpu": (0, DevicePair("cpu", "cpu", "cpu")),
    }
    if asked != "all" and asked not in known:
        raise ConfigError(f"devices {asked!r}: expected all, {', '.join(known)}")
    found = [placement for name, (needed, placement) in known.items() if asked in (name, "all") and needed <= num_gpus]
    if not found:
        raise ConfigError(f"devices {asked!r} needs {known[asked][0]} CUDA devices, this process sees {num_gpus}")
    return found


def lanes(found: Sequence[DevicePair], transports: Sequence[str]) -> list[Lane]:
    """Every transport on every placement where it makes sense to ask.

    What goes through the host does not differ between the same GPU and a peer: of the two, the peer is measured.
    """
    peer = any(placement.name == "peer" for placement in found)
    every: list[Lane] = []
    for placement in found:
        for name in transports:
            try:
                traits = load(name).traits
            except TransportError:
                every.append(Lane(name, None, placement))  # it says why when it is measured
                continue
            on_gpu = placement.daemon != "cpu"
            if placement.name == "same" and peer and "device" not in traits.memory:
                continue
            if placement.name == "peer" and traits.scope == "process":
                continue
            every.append(Lane(name, traits, placement))
            if on_gpu and traits.borrow and placement.daemon == placement.trainer:
                every.append(Lane(name, traits, placement, borrow=True))
    return every


def ring(sizes: Sequence[int], device: str, traits: Traits | None = None) -> tuple[int, int]:
    """(slots, bytes of a slot) of a ring for these sizes; the largest ones do not fit a small GPU or /dev/shm.

    traits: of the transport that is to serve it, None for buffers of raw copies. Raises TransportError when no size
    fits.
    """
    soft, hard, where = RING_BYTES["cpu" if device == "cpu" else "cuda"], 1 << 48, ""
    if device != "cpu":  # a ring for each transport, and three times as much here
        free = free_on(device)
        soft, hard, where = min(soft, free // 16), free // 12, device
    if traits is not None and traits.scope == "host" and (device == "cpu" or "device" not in traits.memory):
        shared = free_shm() // 3  # as large a ring for the other placement, and one more slot for a hop's ceiling
        hard, where = min(hard, shared), "/dev/shm" if shared < hard else where
    fitting = [size for size in sizes if size <= hard]
    if not fitting:
        raise TransportError(f"{where} has {hard / MIB:.0f} MiB to spare for a slot, and every size needs more")
    largest = max(fitting)
    return max(1, min(WINDOW, min(soft, hard) // largest)), largest


def free_shm() -> int:
    """Free bytes of /dev/shm."""
    facts = os.statvfs("/dev/shm")
    return facts.f_bavail * facts.f_frsize


def free_on(device: str) -> int:
    """Free bytes of a GPU."""
    import torch

    return int(torch.cuda.mem_get_info(device)[0])
