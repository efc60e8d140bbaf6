"""The nccl transport: a communicator of two ranks for each session sends slots from the worker's GPU to the trainer's.

The worker has a thread for each session, its lane; what a trainer does, or no longer does, ends that lane at most.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import struct
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, NamedTuple, Protocol

import msgspec

from specd import cuda
from specd.errors import TransportError
from specd.transport import ServerContext, SlotRef, Traits, boot_id, check_into, check_ref, stale, unwrap, wrap
from specd.transports.nccl_comm import (
    BYTES_S,
    EAGER_S,
    PAUSE_S,
    UNIQUE_ID_BYTES,
    Communicator,
    Library,
    Watch,
    library,
    version_text,
)
from specd.transports.nccl_transfer import NOTE_BYTES, WINDOW, WORD_BYTES, Transfer, Transfers

if TYPE_CHECKING:
    import torch

    from specd.arena import Arena, HostArena

log = logging.getLogger(__name__)

MAX_CTAS: Final = 16
"""Most SMs one transfer takes, of the 132 of an H200: the fewest that carry a large slot at full rate (268 MB at 355
GB/s with 16, 347 with 32, 260 with 8). Below 128 MB, 32 would be faster by 0.06 ms a batch, at twice the SMs."""
CONNECT_S: Final = 20.0
"""How long a lane waits for its trainer to attach."""
SEND_S: Final = 30.0
"""How long the first transfer of a lane may wait for its trainer to take it."""
CLOSE_S: Final = 15.0
"""How long `close` waits for all lanes together."""
_NOTE: Final = struct.Struct("<QQQ32xQ")
"""Slot, generation, bytes; and the slot's generation when its bytes had been read."""
assert _NOTE.size == NOTE_BYTES

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


class Ring(Protocol):
    """What is served: a `specd.device.DeviceArena`."""

    @property
    def ledger(self) -> HostArena: ...
    @property
    def device(self) -> str: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    def tensor(self, slot: int) -> torch.Tensor: ...


class _Sent(NamedTuple):
    ref: SlotRef
    transfer: Transfer
    payload: torch.Tensor


class _Lane:
    """One session's rank 0, on a thread of its own: connects, then sends what is published, in order.

    It sleeps while nothing is to be sent. A peer that fails it, or takes nothing for SEND_S, ends it.
    """

    def __init__(self, ring: Ring, library: Library, unique_id: bytes, name: str) -> None:
        self._ring = ring
        self._library = library
        self._unique_id = unique_id
        self._name = name
        self._published: queue.SimpleQueue[SlotRef | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._end = ""
        self._thread = threading.Thread(target=self._run, name="specd-nccl", daemon=True)
        self._thread.start()

    def publish(self, ref: SlotRef) -> None:
        if self._end:
            raise TransportError(f"the nccl lane of {self._name} has ended: {self._end}")
        if self._published.qsize() >= (most := 2 * self._ring.num_slots):
            raise TransportError(f"{most} transfers wait for {self._name}, which does not take them")
        self._published.put(ref)

    def stop(self) -> None:
        """Abandon everything; returns at once."""
        self._stop.set()
        self._published.put(None)

    def join(self, seconds: float) -> bool:
        """Wait for the end of a stopped lane; False if it has not come."""
        self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        transfers: Transfers | None = None
        under_way: deque[_Sent] = deque()
        try:
            watch = Watch(CONNECT_S, self._stop)
            transfers = Transfers(Communicator(self._library, self._ring.device, 0, self._unique_id, MAX_CTAS, watch))
            self._serve(transfers, under_way)
        except TransportError as error:
            self._end = str(error)
            if not self._stop.is_set():
                log.warning("the nccl lane of %s ends: %s", self._name, error)
        except Exception as error:
            self._end = repr(error)
            log.exception("the nccl lane of %s failed", self._name)
        finally:
            self._end = self._end or "it was dropped"
            if transfers is not None:
                transfers.abort(list(under_way))

    def _serve(self, transfers: Transfers, under_way: deque[_Sent]) -> None:
        pause, since = PAUSE_S[0], 0.0
        while not self._stop.is_set():
            room = len(under_way) < WINDOW
            if room and (published := self._next(pause if under_way else None)):
                if not under_way:
                    since = time.monotonic()
                self._send(transfers, published, under_way)
                pause = PAUSE_S[0]
            elif not room:
                self._stop.wait(pause)
            pause = min(2 * pause, PAUSE_S[1])
            while under_way and transfers.over(under_way[0].transfer):
                under_way.popleft()
                pause, since = PAUSE_S[0], time.monotonic()
            if under_way and time.monotonic() - since > SEND_S:
                raise TransportError(f"slot {under_way[0].ref.slot} was not taken within {SEND_S:g} s")

    def _next(self, timeout: float | None) -> SlotRef | None:
        """What was published next; None after the timeout, or when stopped."""
        try:
            return self._published.get(timeout=timeout)
        except queue.Empty:
            return None

    def _send(self, transfers: Transfers, ref: SlotRef, under_way: deque[_Sent]) -> None:
        payload, transfer = self._ring.tensor(ref.slot)[: ref.nbytes], Transfer()
        under_way.append(_Sent(ref, transfer, payload))
        note = _NOTE.pack(ref.slot, ref.generation, ref.nbytes, 0)
        # The word is 0 before a kernel of a refill is launched: read behind the payload, it tells of every one.
        word = _word(self._ring.ledger, ref.slot)
        transfers.send(transfer, payload, note, word, Watch(SEND_S, self._stop))


class NcclServer:
    """Has one lane for each session, and waits for none of them."""

    def __init__(self, ring: Ring, context: ServerContext, library: Library) -> None:
        self._ring = ring
        self._library = library
        self._uuid = cuda.uuid(ring.device)
        self._local_only = not context.host
        self._lock = threading.Lock()
        self._closed = False
        self._lanes: dict[bytes, _Lane] = {}
        self._ending: list[_Lane] = []

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
        unique_id = self._library.unique_id(self._ring.device)
        with self._lock:
            if self._closed:
                raise TransportError("the nccl server is closed")
            self._lanes[session] = _Lane(self._ring, self._library, unique_id, session.hex()[:8])
        ring = self._ring
        offer = NcclOffer(unique_id=unique_id, max_ctas=MAX_CTAS, num_slots=ring.num_slots, slot_bytes=ring.slot_bytes)
        return wrap(offer)

    def publish(self, session: bytes, ref: SlotRef) -> None:
        check_ref(ref, self._ring.num_slots, self._ring.slot_bytes)
        with self._lock:
            lane = self._lanes.get(session)
        if lane is None:
            raise TransportError(f"session {session.hex()[:8]} was not accepted over nccl, or was dropped")
        lane.publish(ref)

    def drop(self, session: bytes) -> None:
        with self._lock:
            self._ending = [lane for lane in self._ending if lane.alive]
            lane = self._lanes.pop(session, None)
            if lane is not None:
                lane.stop()
                self._ending.append(lane)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            lanes = [*self._lanes.values(), *self._ending]
            self._lanes, self._ending = {}, []
        deadline = time.monotonic() + CLOSE_S
        for lane in lanes:
            lane.stop()
        if stuck := [lane for lane in lanes if not lane.join(deadline - time.monotonic())]:
            log.error("%d nccl lanes have not ended within %g s", len(stuck), CLOSE_S)

    def __repr__(self) -> str:
        return f"NcclServer({self._ring.device}, {len(self._lanes)} sessions)"


class NcclClient:
    """Rank 1 of one session. Whatever goes wrong in a transfer ends the communicator: attach anew.

    `into` must be idle on every stream: a transfer waits for no stream but its own.
    """

    def __init__(self, device: str, library: Library) -> None:
        self._device = device
        self._library = library
        self._uuid = cuda.uuid(device)
        self._lock = threading.Lock()
        """Held while the communicator is used: attach, fetch and close may come from different threads."""
        self._closed = threading.Event()
        self._transfers: Transfers | None = None
        self._offer: NcclOffer | None = None
        self._lost = ""

    def hello(self) -> bytes:
        return wrap(NcclHello(host=boot_id(), uuid=self._uuid, version=self._library.version))

    def attach(self, offer: bytes, deadline_s: float) -> None:
        watch = Watch(deadline_s, self._closed)
        found = unwrap(offer, NcclOffer, "nccl offer")
        if len(found.unique_id) != UNIQUE_ID_BYTES or not 1 <= found.max_ctas <= 32:
            raise TransportError("an nccl offer is not what the daemon sent, or from another version of it")
        with self._lock:
            if self._closed.is_set():
                raise TransportError("the nccl client is closed")
            self._abort()
            communicator = Communicator(self._library, self._device, 1, found.unique_id, found.max_ctas, watch)
            self._transfers = Transfers(communicator)
            self._offer, self._lost = found, ""

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        watch = Watch(deadline_s, self._closed)
        with self._lock:
            transfers, offer = self._transfers, self._offer
            if transfers is None or offer is None:
                raise TransportError(self._lost or "nccl: not attached, or closed", lost=bool(self._lost))
            check_ref(ref, offer.num_slots, offer.slot_bytes)
            check_into(ref, into)
            try:
                found = _receive(transfers, ref, into[: ref.nbytes], watch)
            except TransportError as error:
                self._lost = f"the nccl transfer of slot {ref.slot}, generation {ref.generation} was lost: {error}"
                self._abort(into)
                raise TransportError(self._lost, lost=True) from None
        if found != ref.generation:
            raise stale(ref, found)

    def close(self) -> None:
        self._closed.set()  # ends a transfer that waits
        with self._lock:
            self._abort()

    def _abort(self, held: torch.Tensor | None = None) -> None:
        transfers, self._transfers = self._transfers, None
        if transfers is not None:
            transfers.abort(held)

    def __repr__(self) -> str:
        return f"NcclClient({self._device}, {self._transfers or self._lost or 'not attached'})"


class Nccl:
    """Registry entry of `nccl`."""

    traits: ClassVar[Traits] = Traits(
        memory=frozenset({"device"}), scope="anywhere", one_sided=False, needs_recv_ready=True, abortable=False,
        floor_gb_s=2.0,
    )  # fmt: skip

    @staticmethod
    def server(arena: Arena, context: ServerContext) -> NcclServer:
        from specd.device import DeviceArena

        if not isinstance(arena, DeviceArena):
            raise TransportError(f"nccl cannot serve {arena!r}: the ring must lie in device memory")
        return NcclServer(arena, context, library())

    @staticmethod
    def client(device: str) -> NcclClient:
        if not device.startswith("cuda"):
            raise TransportError(f"nccl delivers to a GPU, and the trainer wants its states on {device}")
        return NcclClient(cuda.resolve(device), library())


def _receive(transfers: Transfers, ref: SlotRef, into: torch.Tensor, watch: Watch) -> int:
    """Take one transfer; returns the generation that the slot had when its bytes had been read."""
    transfer = Transfer()
    transfers.receive(transfer, into, watch)
    eager_s = EAGER_S + ref.nbytes / BYTES_S
    watch.until(lambda: transfers.over(transfer), f"receiving {ref.nbytes} bytes", eager_s)
    assert transfer.note is not None
    *sent, generation = _NOTE.unpack(transfer.note.numpy().tobytes())
    if tuple(sent) != ref:
        raise TransportError(
            f"slot, generation and bytes {tuple(sent)} came: fetches are not in the order of RECV_READY"
        )
    return int(generation)


def _word(ledger: HostArena, slot: int) -> torch.Tensor:
    """A device slot's generation where it lies, uint8 [WORD_BYTES], page-locked with the ledger."""
    import torch

    word = (ctypes.c_uint8 * WORD_BYTES).from_address(ledger.word_address(slot, device=True))
    return torch.frombuffer(word, dtype=torch.uint8)
