"""Checks that transports share: hellos and offers from a peer, the generation around a copy, the bytes of a probe."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from specd.errors import TransportError
from specd.protocol.cut import Piece
from specd.transports.base import SlotRef
from specd.transports.pieces import pairs

if TYPE_CHECKING:
    import torch

    from specd.memory.arena import Arena
    from specd.memory.cuda import Copier

T = TypeVar("T")
DIGEST_BYTES = 8


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


def check_ref(ref: SlotRef, num_slots: int, slot_bytes: int, *, cuts: bool = False) -> None:
    """Raise TransportError unless `ref` lies inside the ring, and has no pieces where these are not taken."""
    if ref.pieces and not cuts:
        raise TransportError(
            f"slot {ref.slot} holds more than is wanted, and this transport cannot cut it: take one that can, as "
            f"bytes, or train without subscriber.share"
        )
    if not (0 <= ref.slot < num_slots and 1 <= ref.nbytes <= slot_bytes and ref.generation >= 1):
        raise TransportError(
            f"slot {ref.slot}, generation {ref.generation}, {ref.nbytes} bytes: expected a slot below {num_slots}, a "
            f"generation from 1 and 1 to {slot_bytes} bytes"
        )
    if (piece := _outside(ref.pieces, slot_bytes, ref.nbytes)) is not None:
        raise TransportError(
            f"{piece}: expected rows within the {slot_bytes} bytes of a slot, and within {ref.nbytes} where they go"
        )


@functools.lru_cache(maxsize=256)  # batches of one shape have the same pieces
def _outside(pieces: tuple[Piece, ...], slot_bytes: int, nbytes: int) -> Piece | None:
    """A piece whose rows are not all within a slot and within the bytes at home, or overlap."""
    for piece in pieces:
        source, target, rows, width, pitch, step = piece
        ordered = min(source, target) >= 0 and min(rows, width) >= 1 and min(pitch, step) >= width
        here, home = source + (rows - 1) * pitch + width, target + (rows - 1) * step + width
        if not (ordered and here <= slot_bytes and home <= nbytes):
            return piece
    return None


def check_into(ref: SlotRef, into: torch.Tensor) -> None:
    """Raise TransportError unless the slot's bytes fit in `into`."""
    if into.dim() != 1 or into.element_size() != 1 or into.numel() < ref.nbytes or not into.is_contiguous():
        raise TransportError(
            f"destination is {into.dtype} {list(into.shape)}: expected a contiguous uint8 vector of at least "
            f"{ref.nbytes} bytes"
        )


def pull(arena: Arena, ref: SlotRef, into: torch.Tensor, copier: Copier) -> None:
    """Copy a slot that this process can address, as `Client.fetch` specifies: what the one-sided transports share."""
    check_ref(ref, arena.num_slots, arena.slot_bytes, cuts=True)
    check_into(ref, into)
    if (found := arena.generation(ref.slot)) != ref.generation:
        raise stale(ref, found)
    slot = arena.tensor(ref.slot)
    if not ref.pieces:
        copier.copy(into[: ref.nbytes], slot[: ref.nbytes])
    else:
        copier.copies(pairs(ref.pieces, into, slot))
    if (found := arena.generation(ref.slot)) != ref.generation:
        raise stale(ref, found)


def cancelled(name: str) -> TransportError:
    """The error of a client that was cancelled."""
    return TransportError(f"{name}: cancelled, as the session is over", lost=True)


def stale(ref: SlotRef, found: int) -> TransportError:
    """The error for a slot that does not hold the leased generation (any more)."""
    return TransportError(
        f"slot {ref.slot} holds generation {found}, the lease is for {ref.generation}: the lease expired; submit again"
    )


def pattern(nonce: bytes, nbytes: int) -> NDArray[np.uint8]:
    """Pseudo-random bytes [nbytes] grown from `nonce`, alike on every machine: what a probe is checked against."""
    words = np.random.PCG64(int.from_bytes(nonce, "little")).random_raw(-(-nbytes // 8))
    return np.asarray(words).astype("<u8", copy=False).view(np.uint8)[:nbytes]
