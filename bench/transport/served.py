"""Hosts whose slots hold the run's patterns, which arrivals are compared with."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Final

from specd.bench.transport.lanes import MIB, WINDOW
from specd.bench.transport.loaded import LoadedHost
from specd.errors import TransportError
from specd.transports.base import SlotRef, Transport
from specd.transports.checks import pattern
from specd.transports.registry import load
from specd.transports.testing.hosts import LocalHost

if TYPE_CHECKING:
    import torch

FILL_BYTES: Final = 64 * MIB


class Patterns:
    """What the slots of every ring of this run are filled with, and here to compare with.

    The first slot is filled whole, the others up to FILL_BYTES: making random bytes takes longer than moving them.
    """

    def __init__(self) -> None:
        self.nonces = [secrets.token_bytes(16) for _ in range(WINDOW)]
        self._kept: dict[tuple[int, str], torch.Tensor] = {}

    @staticmethod
    def filled(slot: int, slot_bytes: int) -> int:
        """How many bytes of a slot are filled."""
        return slot_bytes if slot == 0 else min(slot_bytes, FILL_BYTES)

    def prepare(self, num_slots: int, slot_bytes: int) -> None:
        """Make them, once for the largest ring."""
        for slot in range(num_slots):
            self.expected(slot, slot_bytes, "cpu")

    def expected(self, slot: int, nbytes: int, device: str) -> torch.Tensor:
        """What the first `nbytes` bytes of a slot begin with, on a device; the longest one is kept."""
        import torch

        nbytes = self.filled(slot, nbytes)
        kept = self._kept.get((slot, device))
        if kept is None or kept.numel() < nbytes:
            if device == "cpu":
                kept = torch.from_numpy(pattern(self.nonces[slot], nbytes))
            else:
                longest = max(nbytes, self._kept[slot, "cpu"].numel() if (slot, "cpu") in self._kept else 0)
                kept = self.expected(slot, longest, "cpu").to(device)
            self._kept[slot, device] = kept
        return kept[:nbytes]

    def forget(self, device: str) -> None:
        """Free what is kept on a GPU."""
        self._kept = {key: kept for key, kept in self._kept.items() if device == "cpu" or key[1] != device}


class Served:
    """A host whose ring holds the run's patterns."""

    def __init__(self, name: str, device: str, num_slots: int, slot_bytes: int, patterns: Patterns) -> None:
        self.transport: type[Transport] = load(name)
        if device == "cpu" and "host" not in self.transport.traits.memory:
            raise TransportError(f"{name} serves device memory only")
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._patterns = patterns
        self._generations = [1] * num_slots
        self.host: LocalHost | LoadedHost
        if self.transport.traits.scope == "process":
            self.host = LocalHost(self.transport, num_slots, slot_bytes, device=device)
        else:
            self.host = LoadedHost(name, num_slots, slot_bytes, device=device)
        try:
            for slot, nonce in enumerate(patterns.nonces[:num_slots]):
                self.host.fill(slot, 1, nonce, patterns.filled(slot, slot_bytes))
        except BaseException:
            self.host.close()
            raise

    def ref(self, slot: int, nbytes: int) -> SlotRef:
        """A lease on the first bytes of a slot."""
        return SlotRef(slot, self._generations[slot], nbytes)

    def refill(self, nonce: bytes | None, nbytes: int) -> None:
        """Give the first bytes of slot 0 other contents under a new generation, or back its own (None)."""
        self._generations[0] += 1
        self.host.fill(0, self._generations[0], nonce or self._patterns.nonces[0], nbytes)

    def daemon_cpu_s(self) -> float:
        """CPU seconds of the daemon's side so far; none when it is this process, whose are the trainer's."""
        return 0.0 if isinstance(self.host, LocalHost) else self.host.cpu_s()

    def close(self) -> None:
        self.host.close()
