"""The nccl transport: a communicator of two ranks for each session sends slots from the worker's GPU to the trainer's.

The worker has a thread for each session, its sender; what a trainer does, or no longer does, ends that one at most.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, NamedTuple

import msgspec

from specd.endpoints import boot_id
from specd.errors import TransportError
from specd.memory import cuda
from specd.transports.base import ServerContext, SlotRef, Traits
from specd.transports.checks import cancelled, check_into, check_ref, stale, unwrap, wrap
from specd.transports.nccl.communicator import (
    START_S,
    UNIQUE_ID_BYTES,
    Communicator,
    Library,
    library,
    version_text,
)
from specd.transports.nccl.sender import Sender
from specd.transports.nccl.transfer import NOTE, WINDOW, Transfer, Transfers
from specd.transports.nccl.watch import BYTES_S, EAGER_S, Watch

if TYPE_CHECKING:
    import torch

    from specd.memory.arena import Arena

log = logging.getLogger(__name__)

MAX_CTAS: Final = 16
"""Most SMs one transfer takes, of the 132 of an H200: the fewest that carry a large slot at full rate (268 MB at 355
GB/s with 16, 347 with 32, 260 with 8). Below 128 MB, 32 would be faster by 0.06 ms a batch, at twice the SMs."""
CLOSE_S: Final = 15.0
"""How long `close` waits for all senders together."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class NcclHello(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """host: the trainer's boot id. uuid: its GPU. version: its libnccl, such as 22809."""

    host: Name
    uuid: Name
    version: int


class NcclOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The communicator to join as rank 1."""

    unique_id: bytes
    max_ctas: int
    num_slots: int
    slot_bytes: int


class NcclServer:
    """Has one sender for each session, and waits for none of them."""

    def __init__(self, arena: Arena, context: ServerContext, library: Library) -> None:
        self._arena = arena
        self._library = library
        self._uuid = cuda.uuid(arena.device)
        self._local_only = not context.host
        self._lock = threading.Lock()
        self._closed = False
        self._senders: dict[bytes, Sender] = {}
        self._ending: list[Sender] = []

    def accept(self, session: bytes, hello: bytes) -> bytes:
        trainer = unwrap(hello, NcclHello, "nccl hello")
        if trainer.uuid == self._uuid:
            raise TransportError(
                f"trainer and target share {self._uuid}, and NCCL takes no two ranks on one GPU: use --transport "
                f"cuda_ipc"
            )
        if trainer.version != self._library.version:
            raise TransportError(
                f"the trainer has NCCL {version_text(trainer.version)} and the daemon "
                f"{version_text(self._library.version)}: give both the same torch"
            )
        if self._local_only and trainer.host != boot_id():
            raise TransportError("the trainer is on another host and the daemon has no tcp endpoint: start it with one")
        self.drop(session)
        unique_id = self._library.unique_id(self._arena.device)
        with self._lock:
            if self._closed:
                raise TransportError("the nccl server is closed")
            self._senders[session] = Sender(self._arena, self._library, unique_id, MAX_CTAS, session.hex()[:8])
        slots, nbytes = self._arena.num_slots, self._arena.slot_bytes
        return wrap(NcclOffer(unique_id=unique_id, max_ctas=MAX_CTAS, num_slots=slots, slot_bytes=nbytes))

    def publish(self, session: bytes, ref: SlotRef) -> None:
        check_ref(ref, self._arena.num_slots, self._arena.slot_bytes, cuts=True)
        with self._lock:
            sender = self._senders.get(session)
        if sender is None:
            raise TransportError(f"session {session.hex()[:8]} was not accepted over nccl, or was dropped")
        sender.publish(ref)

    def drop(self, session: bytes) -> None:
        with self._lock:
            self._ending = [sender for sender in self._ending if sender.alive]
            sender = self._senders.pop(session, None)
            if sender is not None:
                sender.stop()
                self._ending.append(sender)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            senders = [*self._senders.values(), *self._ending]
            self._senders, self._ending = {}, []
        deadline = time.monotonic() + CLOSE_S
        for sender in senders:
            sender.stop()
        if stuck := [sender for sender in senders if not sender.join(deadline - time.monotonic())]:
            log.error("%d nccl senders have not ended within %g s", len(stuck), CLOSE_S)

    def __repr__(self) -> str:
        return f"NcclServer({self._arena.device}, {len(self._senders)} sessions)"


class _Coming(NamedTuple):
    ref: SlotRef
    into: torch.Tensor
    transfer: Transfer


class NcclClient:
    """Rank 1 of one session, a `Receiver`. Whatever goes wrong in a transfer ends the communicator: attach anew.

    `into` must be idle on every stream: a transfer waits for no stream but its own.
    """

    def __init__(self, device: str, library: Library) -> None:
        self._device = device
        self._library = library
        self._uuid = cuda.uuid(device)
        self._lock = threading.Lock()
        """Held while the communicator is used: attach, fetch and close may come from different threads."""
        self._cancelled = threading.Event()
        self._transfers: Transfers | None = None
        self._offer: NcclOffer | None = None
        self._coming: deque[_Coming] = deque()
        """Transfers to be fetched; receives of the first WINDOW are on the stream."""
        self._lost = ""

    def hello(self) -> bytes:
        return wrap(NcclHello(host=boot_id(), uuid=self._uuid, version=self._library.version))

    def attach(self, offer: bytes, deadline_s: float) -> None:
        watch = Watch(deadline_s, self._cancelled)
        found = unwrap(offer, NcclOffer, "nccl offer")
        if len(found.unique_id) != UNIQUE_ID_BYTES or not 1 <= found.max_ctas <= 32:
            raise TransportError("an nccl offer is not what the daemon sent, or from another version of it")
        with self._lock:
            if self._cancelled.is_set():
                raise cancelled("nccl")
            self._abort()
            try:
                communicator = Communicator(self._library, self._device, 1, found.unique_id, found.max_ctas, watch)
            except TransportError:
                if self._cancelled.is_set():
                    raise cancelled("nccl") from None
                raise
            self._transfers = Transfers(communicator)
            self._offer, self._lost = found, ""

    def expect(self, ref: SlotRef, into: torch.Tensor) -> None:
        watch = Watch(START_S, self._cancelled)
        with self._lock, contextlib.suppress(TransportError):  # for `fetch` to report
            transfers = self._check(ref, into)
            self._coming.append(_Coming(ref, into[: ref.nbytes], Transfer()))
            with self._losing(ref):
                self._begin(transfers, watch)

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        watch = Watch(deadline_s, self._cancelled)
        with self._lock:
            transfers = self._check(ref, into)
            if not self._coming:
                self._coming.append(_Coming(ref, into[: ref.nbytes], Transfer()))
            with self._losing(ref):
                coming = self._coming[0]
                if (coming.ref, coming.into.data_ptr()) != (ref, into.data_ptr()):
                    raise TransportError(f"{coming.ref} was expected first: fetches are not in the order of `expect`")
                self._begin(transfers, watch)
                found = _receive(transfers, coming, watch)
                self._coming.popleft()
                self._begin(transfers, watch)
        if found != ref.generation:
            raise stale(ref, found)

    def cancel(self) -> None:
        self._cancelled.set()

    def close(self) -> None:
        self.cancel()
        with self._lock:
            self._abort()

    def _check(self, ref: SlotRef, into: torch.Tensor) -> Transfers:
        if self._transfers is None or self._offer is None:
            raise TransportError(self._lost or "nccl: not attached, or closed", lost=bool(self._lost))
        if self._cancelled.is_set():
            raise cancelled("nccl")
        check_ref(ref, self._offer.num_slots, self._offer.slot_bytes, cuts=True)
        check_into(ref, into)
        return self._transfers

    def _begin(self, transfers: Transfers, watch: Watch) -> None:
        """Put the receives on the stream that it may have and has not."""
        waiting = [coming for coming in islice(self._coming, WINDOW) if coming.transfer.note is None]
        if waiting:
            with transfers.current():
                for coming in waiting:
                    transfers.receive(coming.transfer, coming.into, watch)

    @contextlib.contextmanager
    def _losing(self, ref: SlotRef) -> Iterator[None]:
        """What goes wrong in here ends the communicator."""
        try:
            yield
        except TransportError as error:
            self._lost = f"the nccl transfer of slot {ref.slot}, generation {ref.generation} was lost: {error}"
            self._abort()
            raise TransportError(self._lost, lost=True) from None

    def _abort(self) -> None:
        transfers, self._transfers = self._transfers, None
        held, self._coming = self._coming, deque()
        if transfers is not None:
            transfers.abort(held)

    def __repr__(self) -> str:
        return f"NcclClient({self._device}, {self._transfers or self._lost or 'not attached'})"


class Nccl:
    """Registry entry of `nccl`."""

    traits: ClassVar[Traits] = Traits(
        memory=frozenset({"device"}), scope="anywhere", one_sided=False, needs_recv_ready=True, abortable=False,
        cuts=True, floor_gb_s=2.0, rank=400,
    )  # fmt: skip

    @staticmethod
    def available(device: str) -> None:
        return None

    @staticmethod
    def server(arena: Arena, context: ServerContext) -> NcclServer:
        if arena.memory != "device":
            raise TransportError(f"nccl cannot serve {arena!r}: the ring must lie in device memory")
        return NcclServer(arena, context, library())

    @staticmethod
    def client(device: str) -> NcclClient:
        if not device.startswith("cuda"):
            raise TransportError(f"nccl delivers to a GPU, and the trainer wants its states on {device}")
        return NcclClient(cuda.resolve(device), library())


def _receive(transfers: Transfers, coming: _Coming, watch: Watch) -> int:
    """Wait for one transfer; returns the generation that the slot had when its bytes had been read."""
    ref, transfer = coming.ref, coming.transfer
    eager_s = EAGER_S + ref.nbytes / BYTES_S
    watch.until(lambda: transfers.over(transfer), f"receiving {ref.nbytes} bytes", eager_s)
    assert transfer.note is not None
    *sent, generation = NOTE.unpack(transfer.note.numpy().tobytes())
    if tuple(sent) != (ref.slot, ref.generation, ref.nbytes):
        raise TransportError(
            f"slot, generation and bytes {tuple(sent)} came: fetches are not in the order of RECV_READY"
        )
    return int(generation)
