"""The device arena: the ring of a GPU target, its slots in device memory and their generations in host memory.

A shared one is a single cudaMalloc of its own, which other processes open by its handle. A private one is torch's, so
that a tensor of a slot, read in place in this process, keeps the memory alive.

Who may write what, and in which order:

    refill    begin: both generations 0 · kernels write the device slot · their completion event · seal
    seal      the device's generation · then, while a session reads on the host: the slot's bytes to the mirror, and
              the host's generation if the device's is still the same; it was 0 until then
    a reader  generation, copy, generation again: equal before and after, or the bytes are worthless
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import TYPE_CHECKING, Literal

from specd.errors import TransportError
from specd.memory import cuda
from specd.memory.arena import PAGE, HostArena

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

log = logging.getLogger(__name__)


class DeviceArena:
    """Slots in the memory of one GPU; an `Arena`. Built by `create`, in the worker. All methods are thread-safe.

    device: such as `cuda:0`. num_slots, slot_bytes: geometry. stride: bytes from one slot to the next, whole pages.
    ledger: the host arena with the slots' generations, page-locked; its own slots are the mirror, if there is one.
    """

    def __init__(
        self,
        ledger: HostArena,
        memory: torch.Tensor,
        allocation: cuda.Allocation | None,
        num_slots: int,
        slot_bytes: int,
        device: str,
    ) -> None:
        self._memory: torch.Tensor | None = memory
        self._allocation = allocation
        self._exported = False
        self._views: dict[int, torch.Tensor] = {}
        self._nbytes = [0] * num_slots  # bytes of each slot that count, since it was last sealed
        self._readers: set[bytes] = set()
        # Held for a look at several generations at once; never during a copy, because `begin` waits for it.
        self._words = threading.Lock()
        self._copying = threading.Lock()
        self._copier = cuda.Copier()  # under `_copying`
        self.ledger = ledger
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.stride = _pages(slot_bytes)
        self.device = device
        self.path = ledger.path

    @classmethod
    def create(cls, num_slots: int, slot_bytes: int, device: str, shared: str | None, mirrored: bool) -> DeviceArena:
        """The worker's arena on `device`. shared: the epoch in hex, so that other processes can open it; else None.

        mirrored: whether slots can be read on the host, too, which takes as much memory there.
        Raises TransportError when there is not enough memory of either kind, or the driver does not page-lock it.
        """
        device = cuda.resolve(device)
        if slot_bytes < 1:
            raise TransportError(f"{num_slots} slots of {slot_bytes} bytes: expected slots of at least 1 byte")
        ledger = HostArena.create(num_slots, slot_bytes if mirrored else 0, shared)
        with contextlib.ExitStack() as undo:
            undo.callback(ledger.close)
            nbytes = num_slots * _pages(slot_bytes)
            allocation = cuda.Allocation(nbytes, device) if shared is not None and _exportable() else None
            if allocation is not None:
                undo.callback(allocation.free)
            memory = private_memory(nbytes, device) if allocation is None else allocation.tensor()
            cuda.register(*ledger.mapping, device)
            undo.pop_all()
        return cls(ledger, memory, allocation, num_slots, slot_bytes, device)

    @property
    def memory(self) -> Literal["device"]:
        return "device"

    @property
    def mirrored(self) -> bool:
        """Whether `read_on_host` can be asked for."""
        return self.ledger.slot_bytes > 0

    def tensor(self, slot: int) -> torch.Tensor:
        """One slot as uint8 [slot_bytes] on the device, without a copy. In a shared arena it dies with the arena."""
        view = self._views.get(slot)
        if view is None:
            offset = self._offset(slot)
            view = self._views[slot] = self._whole()[offset : offset + self.slot_bytes]
        return view

    def address(self, slot: int) -> int:
        """Where a slot begins, as the device's pointer."""
        return self._whole().data_ptr() + self._offset(slot)

    def handle(self) -> bytes:
        """See Arena. Raises TransportError when the memory is private, or cupy or the driver does not export it."""
        self._whole()
        if self._allocation is None:
            cuda.runtime()  # raises with the remedy where cupy is missing
            raise TransportError(f"{self!r} is private: it cannot be opened from another process")
        handle = self._allocation.handle()
        self._exported = True
        return handle

    def write(self, slot: int, data: NDArray[np.uint8]) -> None:
        """Put host bytes at the start of a slot, between `begin` and `seal`; on return they are there."""
        import torch

        with self._copying:
            self._copier.copy(self.tensor(slot)[: data.size], torch.from_numpy(data))

    def begin(self, slot: int) -> None:
        """Mark a slot as being written, here and in the mirror: before the first kernel that writes it is launched."""
        with self._words:
            self.ledger.begin(slot, device=True)
            self.ledger.begin(slot)

    def seal(self, slot: int, generation: int, nbytes: int = 0) -> None:
        """Mark a slot as holding `generation` (≥ 1); every kernel that writes it must be complete.

        nbytes: how many of its bytes count, 0 for all; only they are mirrored. While a session reads on the host, the
        mirror holds them on return.
        """
        self._offset(slot)
        with self._words:
            self._nbytes[slot] = nbytes or self.slot_bytes
            self.ledger.seal(slot, generation, device=True)
            wanted = bool(self._readers)
        if wanted:
            self._mirror(slot)

    def generation(self, slot: int) -> int:
        """See Arena. What the mirror holds is `ledger.generation(slot)`."""
        return self.ledger.generation(slot, device=True)

    def word_address(self, slot: int) -> int:
        """See Arena; page-locked with the ledger."""
        return self.ledger.word_address(slot, device=True)

    def read_on_host(self, session: bytes, wanted: bool) -> None:
        """Note whether a session reads slots on the host: while any does, `seal` copies them there.

        On return the mirror holds every slot that is sealed, if it is wanted. Raises TransportError without a mirror.
        """
        if wanted and not self.mirrored:
            raise TransportError(f"{self!r} has no mirror: its slots cannot be read on the host")
        with self._words:
            (self._readers.add if wanted else self._readers.discard)(session)
        if wanted:
            for slot in range(self.num_slots):
                self._mirror(slot)

    def _mirror(self, slot: int) -> None:
        """Bring one slot's mirror up to date, unless it is being refilled: then its `seal` does."""
        with self._copying:
            with self._words:
                generation, nbytes = self.generation(slot), self._nbytes[slot]
                if generation in (0, self.ledger.generation(slot)):
                    return
            self._copier.copy(self.ledger.tensor(slot)[:nbytes], self.tensor(slot)[:nbytes])
            # A slot that was refilled under the copy gave torn bytes, and `begin` came before the first of them.
            with self._words:
                if self.generation(slot) == generation:
                    self.ledger.seal(slot, generation)

    def close(self) -> None:
        """Unlink the ledger and let go of the memory; call it after every server's close. Idempotent.

        Memory that was exported is left to the end of this process: freeing it under a trainer that has it open is
        undefined, and no one can tell when the last one closed it.
        """
        with self._copying:
            if self._memory is None:
                return
            self._memory = None
            self._views.clear()
            cuda.unregister(self.ledger.mapping.address, self.device)
            self.ledger.close()
            if self._allocation is not None and not self._exported:
                self._allocation.free()

    def _whole(self) -> torch.Tensor:
        if self._memory is None:
            raise TransportError(f"{self!r} is closed: its slots can no longer be used")
        return self._memory

    def _offset(self, slot: int) -> int:
        if not 0 <= slot < self.num_slots:
            raise TransportError(f"slot {slot} is out of range: the ring has {self.num_slots} slots")
        return slot * self.stride

    def __enter__(self) -> DeviceArena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        kind = "closed" if self._memory is None else "mirrored" if self.mirrored else "not mirrored"
        size = f"{self.num_slots} × {self.slot_bytes} bytes on {self.device}"
        return f"DeviceArena({size}, {self.path or 'private'}, {kind})"


def private_memory(nbytes: int, device: str) -> torch.Tensor:
    """Page-aligned memory of torch's, uint8 [nbytes]. Raises TransportError when there is not enough."""
    import torch

    try:
        memory = torch.empty(nbytes + PAGE, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise TransportError(
            f"cannot reserve {nbytes / 2**20:.0f} MiB on {device}: {error}; configure fewer or shorter slots "
            f"(ring.slots, ring.slot_tokens)"
        ) from None
    return memory[-memory.data_ptr() % PAGE :][:nbytes]


def _exportable() -> bool:
    """Whether memory can be allocated in a way that other processes can open."""
    try:
        cuda.runtime()
    except TransportError as error:
        log.info("the ring can only be read through the host or by copies of the worker: %s", error)
        return False
    return True


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE
