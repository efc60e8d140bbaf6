"""What a transport is, which ones exist, and which one `auto` takes.

A transport moves the bytes of a leased slot from the daemon's worker to a trainer. It has a server side in the
worker and a client side in the trainer; everything else (leases, credits, announcements) belongs to the control plane.
A plug-in is a class like the built-in ones under an entry point of the group `specd.transports`; the suite in
`specd.transports.testing.suite` says whether it behaves (`conformance_receiver`, if its client is a `Receiver`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from specd.errors import SpecdError, TransportError

if TYPE_CHECKING:
    import torch

    from specd.memory.arena import Arena
    from specd.memory.cuda import Copier

T = TypeVar("T")

BUILTIN: dict[str, str] = {
    "inproc": "specd.transports.inproc:Inproc",
    "cuda_ipc": "specd.transports.cuda_ipc:CudaIpc",
    "nixl": "specd.transports.nixl.transport:Nixl",
    "nccl": "specd.transports.nccl.transport:Nccl",
    "shm": "specd.transports.shm:Shm",
    "bytes": "specd.transports.bytes.server:Bytes",
}
ENTRY_POINT_GROUP = "specd.transports"
HOST_ORDER = ("shm", "bytes")
"""What `auto` tries, best first, for a trainer whose states go to host memory; between two processes."""
DEVICE_ORDER = ("cuda_ipc", "nixl", "nccl", *HOST_ORDER)
"""What `auto` tries, best first, for a trainer on a GPU."""


DIGEST_BYTES = 8


class Traits(msgspec.Struct, frozen=True, kw_only=True):
    """Static facts of a transport.

    memory: where the arena it exports may lie; one that takes both is given the device's.
    scope: how far apart the two sides may be.
    one_sided: the trainer pulls without the worker taking part.
    needs_recv_ready: the trainer announces RECV_READY and only then `Server.publish` is called.
    abortable: a transfer in flight can be given up and the next one made over the same client; if not, giving one up
    loses the client. borrow: its client is a `Borrower`. floor_gb_s: slower than this, `auto` does not take it.
    """

    memory: frozenset[Literal["host", "device"]]
    scope: Literal["process", "host", "anywhere"]
    one_sided: bool
    needs_recv_ready: bool
    abortable: bool
    borrow: bool = False
    floor_gb_s: float = 0.0


class SlotRef(NamedTuple):
    """One leased slot: its index, the generation the lease is for, and the number of bytes that count."""

    slot: int
    generation: int
    nbytes: int


class ServerContext(msgspec.Struct, frozen=True, kw_only=True):
    """Where a server that needs sockets may bind them.

    directory: this user's 0700 directory for ipc sockets; empty for none. host: the one interface (an address, no
    wildcard) to be reached at from other hosts; empty when the daemon is not to be reached from any.
    """

    directory: str = ""
    host: str = ""


class Server(Protocol):
    """The worker's side. Built by `Transport.server`, which raises TransportError when it cannot serve that arena.

    Called from the worker's service thread; no method may block on a peer. A server that must wait has its own thread.
    """

    def accept(self, session: bytes, hello: bytes) -> bytes:
        """Let one trainer in. `hello` is what its `Client.hello()` gave; returns the offer its `Client.attach` takes.

        Raises TransportError for a hello that is not one, or a trainer that cannot be served. A session that is
        accepted again starts afresh.
        """
        ...

    def publish(self, session: bytes, ref: SlotRef) -> None:
        """Start sending one slot to one session; returns at once. Only called for `needs_recv_ready` transports.

        The caller has checked that the session holds a lease on it. Transfers of one session are made in the order they
        were published in, and fetched in that order. Publishing it again starts it over where a transfer is abortable;
        elsewhere every publication is one transfer, which the client has to fetch. Raises TransportError for a slot or
        session that does not exist; a slot that no longer holds the generation is the client's `fetch` to report.
        """
        ...

    def drop(self, session: bytes) -> None:
        """Forget a session and abandon what is in flight to it. Unknown sessions are ignored."""

    def close(self) -> None:
        """Release everything. Idempotent."""


class Client(Protocol):
    """The trainer's side. Built by `Transport.client(device)`, which raises TransportError when it cannot run here.

    `hello` and `attach` run on the subscriber's I/O thread, `fetch` on its fetch thread.
    """

    def hello(self) -> bytes:
        """Opaque facts for `Server.accept`; at most 4 KiB."""
        ...

    def attach(self, offer: bytes, deadline_s: float) -> None:
        """Open what the worker offered. Raises TransportError when it cannot be opened here, within `deadline_s`."""

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        """Copy the slot's first `ref.nbytes` bytes to `into` (uint8 [≥ nbytes], on the client's device).

        Nothing may still be reading or writing `into`: a transfer waits for no stream but its own.
        On return the bytes are usable on any stream and were verified to be of `ref.generation`.
        Raises TransportError when they are not, or after `deadline_s`; `into` then holds garbage. If the error says
        `lost`, nothing can be fetched any more.
        """

    def close(self) -> None:
        """Release everything. Idempotent."""


@runtime_checkable
class Receiver(Client, Protocol):
    """A client whose transfers can begin before they are fetched, so that the wire does not idle between them."""

    def expect(self, ref: SlotRef, into: torch.Tensor) -> None:
        """The transfer of `ref` to `into` may begin now; returns at once, and what goes wrong is for `fetch` to report.

        Called on the thread that fetches, for any number of slots, in the order of their RECV_READYs. Each is then to
        be fetched, in this order and to the same `into`, which belongs to the transfer until then; a slot that was not
        expected can be fetched once none is left that was. A fetch that fails with `lost` loses all that are expected.
        """

    def call_off(self) -> None:
        """Whatever waits for the daemon now or later fails, with `lost`; returns at once, and only `close` is left.

        Called on any thread when the session is lost: a transfer that has begun need not notice that its peer is gone.
        """


class Borrower(Client, Protocol):
    """A client that can also lend a slot where it lies, without a copy."""

    def view(self, ref: SlotRef) -> torch.Tensor:
        """The slot's first `ref.nbytes` bytes in place, uint8, on the client's device, not to be written.

        Valid until the lease is released, and verified to be of `ref.generation` now. Raises TransportError when they
        are not, or lie on another device.
        """
        ...


class Transport(Protocol):
    """What a registry entry points to: a class with static traits and a factory for each side, never instantiated."""

    traits: ClassVar[Traits]

    @staticmethod
    def server(arena: Arena, context: ServerContext) -> Server:
        """The worker's side for one arena. Raises TransportError when it cannot serve it."""
        ...

    @staticmethod
    def client(device: str) -> Client:
        """The trainer's side; `device` is where `fetch` delivers. Raises TransportError when it cannot run here."""
        ...


def wrap(facts: Any) -> bytes:
    """A hello or an offer as it travels: the XXH3-64 of its MessagePack, 8 bytes, then that."""
    body = msgspec.msgpack.encode(facts)
    return xxhash.xxh3_64_digest(body) + body


def unwrap(data: bytes, kind: type[T], what: str) -> T:
    """A hello or an offer that came from the peer, as the struct `kind`. Raises TransportError that names it.

    The checksum is there because drivers crash, or wait for ever, on a handle that was damaged on its way.
    """
    digest, body = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    if digest != xxhash.xxh3_64_digest(body):
        raise TransportError(f"not a {what}: {len(data)} bytes that do not match their checksum")
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TransportError(f"not a {what}: {error}") from None


def check_ref(ref: SlotRef, num_slots: int, slot_bytes: int) -> None:
    """Raise TransportError unless `ref` lies inside the ring."""
    if not (0 <= ref.slot < num_slots and 1 <= ref.nbytes <= slot_bytes and ref.generation >= 1):
        raise TransportError(
            f"slot {ref.slot}, generation {ref.generation}, {ref.nbytes} bytes: expected a slot below {num_slots}, a "
            f"generation from 1 and 1 to {slot_bytes} bytes"
        )


def check_into(ref: SlotRef, into: torch.Tensor) -> None:
    """Raise TransportError unless the slot's bytes fit in `into`."""
    if into.dim() != 1 or into.element_size() != 1 or into.numel() < ref.nbytes or not into.is_contiguous():
        raise TransportError(
            f"destination is {into.dtype} {list(into.shape)}: expected a contiguous uint8 vector of at least "
            f"{ref.nbytes} bytes"
        )


def pull(arena: Arena, ref: SlotRef, into: torch.Tensor, copier: Copier) -> None:
    """Copy a slot that this process can address, as `Client.fetch` specifies: what the one-sided transports share."""
    check_ref(ref, arena.num_slots, arena.slot_bytes)
    check_into(ref, into)
    if (found := arena.generation(ref.slot)) != ref.generation:
        raise stale(ref, found)
    copier.copy(into[: ref.nbytes], arena.tensor(ref.slot)[: ref.nbytes])
    if (found := arena.generation(ref.slot)) != ref.generation:
        raise stale(ref, found)


def stale(ref: SlotRef, found: int) -> TransportError:
    """The error for a slot that does not hold the leased generation (any more)."""
    return TransportError(
        f"slot {ref.slot} holds generation {found}, the lease is for {ref.generation}: the lease expired; submit again"
    )


def pattern(nonce: bytes, nbytes: int) -> NDArray[np.uint8]:
    """Pseudo-random bytes [nbytes] grown from `nonce`, alike on every machine: what a probe is checked against."""
    words = np.random.PCG64(int.from_bytes(nonce, "little")).random_raw(-(-nbytes // 8))
    return np.asarray(words).astype("<u8", copy=False).view(np.uint8)[:nbytes]


def boot_id() -> str:
    """Identity of the running kernel: two processes with the same one are on the same host."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def names() -> list[str]:
    """All transports that can be asked for by name: built-in ones first, then plug-ins."""
    plugins = {entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)}
    return [*BUILTIN, *sorted(plugins - BUILTIN.keys())]


def load(name: str) -> type[Transport]:
    """Import the transport called `name`. Raises TransportError that lists the known names, or says what failed."""
    target = BUILTIN.get(name)
    try:
        if target is not None:
            module, _, attribute = target.partition(":")
            found: Any = getattr(importlib.import_module(module), attribute)
        else:
            plugins = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
            if name not in plugins:
                raise TransportError(f"unknown transport {name!r}; known here: {', '.join(names())}")
            found = plugins[name].load()
    except SpecdError:
        raise
    except Exception as error:  # a plug-in's import may raise anything
        raise TransportError(f"transport {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if (
        not isinstance(getattr(found, "traits", None), Traits)
        or not hasattr(found, "server")
        or not hasattr(found, "client")
    ):
        raise TransportError(f"transport {name!r} is {found!r}: expected a class with traits, server and client")
    return found  # type: ignore[no-any-return]


class Choice(NamedTuple):
    """The outcome of `choose`: the transport taken, and why each candidate before it was not."""

    name: str
    reasons: dict[str, str]


def choose(
    asked: str, offered: Sequence[str], same_process: bool, device: str, probe: Callable[[str], str | None]
) -> Choice:
    """Pick the transport for one session.

    asked: `auto` or a name. offered: what the daemon serves. same_process: whether trainer and worker share one.
    device: where the trainer wants the states. probe: moves verified bytes over one candidate and returns None, or the
    reason why it failed. `auto` tries the built-in ones best first, then plug-ins by name. A name is that transport or
    a TransportError, never another one.
    """
    served = f"the daemon does not serve it (it serves {', '.join(offered) or 'none'})"
    if asked != "auto":
        reason = _attempt(probe, asked) if asked in offered else served
        if reason is not None:
            raise TransportError(f"transport {asked!r} cannot be used: {reason}")
        return Choice(asked, {})
    reasons: dict[str, str] = {}
    order = HOST_ORDER if device == "cpu" else DEVICE_ORDER
    if same_process:
        order = ("inproc", *order)
    for name in (*order, *sorted(set(offered) - set(order) - {"inproc"})):
        reason = _attempt(probe, name) if name in offered else served
        if reason is None:
            return Choice(name, reasons)
        reasons[name] = reason
    raise TransportError("no transport works: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def _attempt(probe: Callable[[str], str | None], name: str) -> str | None:
    try:
        return probe(name)
    except TransportError as error:
        return str(error)
