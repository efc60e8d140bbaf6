"""The cuda_ipc transport: the trainer opens the daemon's device memory and copies its slots out, or reads them there.

The handle is opened once a session; a fetch is a look at the slot's generation in the shared ledger, one copy by the
trainer's own GPU, and another look. The worker takes no part in it.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, ClassVar

import msgspec

from specd.endpoints import boot_id
from specd.errors import TransportError
from specd.memory import cuda
from specd.memory.arena import MAX_SLOTS, HostArena
from specd.transports.base import ServerContext, SlotRef, Traits
from specd.transports.checks import cancelled, check_into, check_ref, stale, unwrap, wrap

if TYPE_CHECKING:
    import torch

    from specd.memory.arena import Arena

log = logging.getLogger(__name__)


class CudaIpcHello(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """host: the trainer's boot id. gpu: the uuid of the device that will read."""

    host: str
    gpu: str


class CudaIpcOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """handle: of the memory on the device `gpu`, in which slot i begins at `i * stride` and has `slot_bytes` bytes.

    path, num_slots, ledger_bytes: the ledger with the slots' generations; see `HostArena.open`.
    """

    handle: bytes
    gpu: str
    path: str
    num_slots: int
    slot_bytes: int
    stride: int
    ledger_bytes: int


class CudaIpcServer:
    """Tells each session where the memory and its ledger are; the rest is the trainer's own work."""

    def __init__(self, arena: Arena) -> None:
        self._offer = CudaIpcOffer(
            handle=arena.handle(),
            gpu=cuda.uuid(arena.device),
            path=arena.path,
            num_slots=arena.num_slots,
            slot_bytes=arena.slot_bytes,
            stride=arena.stride,
            ledger_bytes=arena.ledger.slot_bytes,
        )

    def accept(self, session: bytes, hello: bytes) -> bytes:
        trainer = unwrap(hello, CudaIpcHello, "cuda_ipc hello")
        if trainer.host != boot_id():
            raise TransportError("cuda_ipc needs the trainer on the daemon's host: use --transport nccl or bytes")
        log.debug("%s is offered to a trainer on %s", self._offer.gpu, trainer.gpu)
        return wrap(self._offer)

    def publish(self, session: bytes, ref: SlotRef) -> None:
        raise TransportError("cuda_ipc is pulled by the trainer: it never publishes")

    def drop(self, session: bytes) -> None:
        """Nothing to forget: a late read is harmless, the trainer's generation check fails it."""

    def close(self) -> None:
        """Nothing to release: the memory is the arena's."""

    def __repr__(self) -> str:
        return f"CudaIpcServer({self._offer.gpu})"


class _MappedRing:
    """The daemon's ring, opened by one trainer."""

    __slots__ = ("_views", "mapping", "offer", "words")

    def __init__(self, offer: CudaIpcOffer, device: str) -> None:
        self.offer = offer
        self.words = HostArena.open(offer.path, offer.num_slots, offer.ledger_bytes, words_only=True)
        try:
            self.mapping = _open(offer, device)
        except TransportError:
            self.words.close()
            raise
        self._views: dict[int, torch.Tensor] = {}

    def check(self, ref: SlotRef) -> None:
        """Raise TransportError unless the slot holds the leased generation."""
        if (found := self.words.generation(ref.slot, device=True)) != ref.generation:
            raise stale(ref, found)

    def view(self, ref: SlotRef) -> torch.Tensor:
        """The leased bytes in place. Raises TransportError when they do not follow one another there."""
        if (begin := ref.begin) is None:
            raise TransportError(
                f"slot {ref.slot} has these states in {len(ref.pieces)} pieces: they have to be copied"
            )
        whole = self._views.get(ref.slot)
        if whole is None:
            offer = self.offer
            whole = self._views[ref.slot] = self.mapping.tensor(ref.slot * offer.stride, offer.slot_bytes)
        return whole[begin : begin + ref.nbytes]

    def close(self) -> None:
        """Unmap it all, except lent slots, which stay mapped as long as their views live."""
        self._views.clear()
        self.mapping.close()
        self.words.close()


class CudaIpcClient:
    """Opens the memory once, then copies slot by slot, or lends them in place."""

    def __init__(self, device: str) -> None:
        if not device.startswith("cuda"):
            raise TransportError(f"cuda_ipc delivers to a GPU, and the trainer's device is {device}: use shm")
        cuda.runtime()
        self._device = cuda.resolve(device)
        self._gpu = cuda.uuid(self._device)
        self._lock = threading.Lock()
        """Held while memory is used: attach, fetch and close may come from different threads."""
        self._ring: _MappedRing | None = None
        self._cancelled = False

    def hello(self) -> bytes:
        return wrap(CudaIpcHello(host=boot_id(), gpu=self._gpu))

    def attach(self, offer: bytes, deadline_s: float) -> None:
        if self._cancelled:
            raise cancelled("cuda_ipc")
        found = unwrap(offer, CudaIpcOffer, "cuda_ipc offer")
        if not (1 <= found.num_slots <= MAX_SLOTS and 1 <= found.slot_bytes <= found.stride < 1 << 48):
            raise TransportError(
                f"offer of {found.num_slots} slots of {found.slot_bytes} bytes, {found.stride} apart: out of range"
            )
        ring = _MappedRing(found, self._device)
        self.close()
        with self._lock:
            self._ring = ring

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        # No deadline is looked at: it takes milliseconds, and a copy that a GPU has begun cannot be called back.
        with self._lock:
            if self._cancelled:
                raise cancelled("cuda_ipc")
            ring = self._opened()
            offer = ring.offer
            check_ref(ref, offer.num_slots, offer.slot_bytes, cuts=True)
            check_into(ref, into)
            ring.check(ref)
            ring.mapping.read(ref.slot * offer.stride, ref.nbytes, into.data_ptr(), ref.pieces)
            ring.check(ref)

    def view(self, ref: SlotRef) -> torch.Tensor:
        """See Borrower; the bytes stay mapped as long as the view lives, but only the lease keeps them as they are."""
        with self._lock:
            ring = self._opened()
            check_ref(ref, ring.offer.num_slots, ring.offer.slot_bytes, cuts=True)
            if ring.offer.gpu != self._gpu:
                raise TransportError(
                    f"slots can only be read in place on the GPU that holds them: that is {ring.offer.gpu}, and the "
                    f"trainer's {self._device} is {self._gpu}"
                )
            ring.check(ref)
            return ring.view(ref)

    def cancel(self) -> None:
        self._cancelled = True

    def close(self) -> None:
        with self._lock:
            ring, self._ring = self._ring, None
            if ring is not None:
                ring.close()

    def _opened(self) -> _MappedRing:
        if self._ring is None:
            raise TransportError("cuda_ipc: not attached, or closed")
        return self._ring

    def __repr__(self) -> str:
        return f"CudaIpcClient({self._device}, {'attached' if self._ring else 'not attached'})"


def _open(offer: CudaIpcOffer, device: str) -> cuda.Mapping:
    """Open the offered memory for `device`. Raises TransportError with the remedy."""
    holder = cuda.visible().get(offer.gpu)
    if holder is not None and not cuda.can_read(device, holder):
        raise TransportError(
            f"{device} has no peer access to {holder}, which holds the daemon's ring: use --transport nccl or shm"
        )
    try:
        return cuda.Mapping(offer.handle, device)
    except TransportError as error:
        hidden = ""
        if holder is None:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
            hidden = f"; this process does not see that GPU, which may be why (CUDA_VISIBLE_DEVICES: {seen})"
        raise TransportError(f"{device} cannot open the daemon's ring on {offer.gpu}: {error}{hidden}") from None


class CudaIpc:
    """Registry entry of `cuda_ipc`."""

    traits: ClassVar[Traits] = Traits(
        memory=frozenset({"device"}),
        scope="host",
        one_sided=True,
        needs_recv_ready=False,
        abortable=True,
        borrow=True,
        cuts=True,
        floor_gb_s=10.0,
        rank=200,
    )

    @staticmethod
    def available(device: str) -> None:
        return None

    @staticmethod
    def server(arena: Arena, context: ServerContext) -> CudaIpcServer:
        if arena.memory != "device" or not arena.path:
            raise TransportError(f"cuda_ipc cannot serve {arena!r}: the ring must lie in shared device memory")
        return CudaIpcServer(arena)

    @staticmethod
    def client(device: str) -> CudaIpcClient:
        return CudaIpcClient(device)
