"""Batches and their bytes: sequences packed end to end, the content id of a batch, the layout of tensors in a slot.

Shape legend: T tokens of a batch, B sequences, N taps, H hidden size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from specd.protocol import payload
from specd.protocol.capture import DTYPE_BYTES, CaptureSpec, StateDtype
from specd.protocol.limits import MAX_DIMENSIONS, MAX_TENSORS

if TYPE_CHECKING:
    import torch

ALIGNMENT = 4096
"""Byte alignment of every tensor in a slot: a page, so that copies and kernels see the same alignment everywhere."""

TAPS_SCALE, FINAL_SCALE = "taps_scale", "final_scale"


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """One trainer micro-batch: B sequences packed end to end, no padding.

    tokens: int32 [T]. lengths: int32 [B], sums to T. loss_mask: bool [T], True where a token may be a training label.
    samples: B ids of the data set's samples, for accounting. epoch, index: where in the data plan it stands.
    payloads: what each sequence brings for the target beside its tokens (`specd.protocol.payload`), empty for one
    without; () if none brings anything.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    samples: tuple[int, ...]
    epoch: int = 0
    index: int = 0
    payloads: tuple[bytes, ...] = ()

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.size)


class TensorRef(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor inside a slot: bytes [offset, offset + nbytes), row-major."""

    name: str
    offset: int
    shape: Annotated[tuple[int, ...], Meta(max_length=MAX_DIMENSIONS)]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class Layout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All tensors of one batch inside its slot, and the bytes they span."""

    tensors: Annotated[tuple[TensorRef, ...], Meta(max_length=MAX_TENSORS)]
    nbytes: int

    def gaps(self) -> Iterator[slice]:
        """The bytes between the tensors. They are sent and hold no states: another batch's may lie there."""
        ends = [0, *(ref.offset + ref.nbytes for ref in self.tensors)]
        begins = [*(ref.offset for ref in self.tensors), self.nbytes]
        return (slice(end, begin) for end, begin in zip(ends, begins, strict=True) if end < begin)


def slot_layout(spec: CaptureSpec, hidden_size: int, num_tokens: int) -> Layout:
    """Where a batch's states lie in its slot.

    `taps` [T, N, H] interleaves the taps of a token, so that it reads as [T, N·H] without a concatenation;
    `final` [T, H] follows at the next aligned offset. Behind each of them lie its scales if it is float8, float32
    [N, T] and [T]: those of a tap follow one another, so that a cut copies no single numbers. Daemon and trainer both
    compute it and compare.
    """
    taps, size = len(spec.taps), num_tokens
    wanted: list[tuple[str, tuple[int, ...], StateDtype]] = []
    if taps:
        wanted.append(("taps", (size, taps, hidden_size), spec.dtype))
        if spec.scaled:
            wanted.append((TAPS_SCALE, (taps, size), "float32"))
    if spec.final:
        wanted.append(("final", (size, hidden_size), spec.dtype))
        if spec.scaled:
            wanted.append((FINAL_SCALE, (size,), "float32"))
    tensors: list[TensorRef] = []
    end = 0
    for name, shape, dtype in wanted:
        tensor = TensorRef(name=name, offset=-(-end // ALIGNMENT) * ALIGNMENT, shape=shape, dtype=dtype)
        tensors.append(tensor)
        end = tensor.offset + tensor.nbytes
    return Layout(tensors=tuple(tensors), nbytes=end)


def slot_bytes(spec: CaptureSpec, hidden_size: int, num_tokens: int) -> int:
    """Bytes of a slot that holds any batch of up to `num_tokens` tokens of this spec, rounded up to ALIGNMENT."""
    return -(-slot_layout(spec, hidden_size, num_tokens).nbytes // ALIGNMENT) * ALIGNMENT


def batch_id(
    fingerprint: str,
    tokens: NDArray[np.int32],
    lengths: NDArray[np.int32],
    payloads: Sequence[bytes] = (),
) -> bytes:
    """16-byte content id of a batch: the same target, tokens, lengths and payloads always give the same id."""
    digest = hashlib.blake2b(digest_size=16)
    parts = [fingerprint.encode(), _bytes(tokens), _bytes(lengths)]
    if payloads:
        parts.append(payload.digests(payloads))
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _bytes(numbers: NDArray[np.int32]) -> bytes:
    return numbers.astype("<i4").tobytes()


class Delivery:
    """One batch with its states on the trainer's device, in the target's dtype where they travelled as float8.

    taps: [T, N, H], so that `taps.flatten(1)` is [T, N·H] without a copy; final: [T, H]; None where not captured.
    Both are views of a buffer of the subscriber's, valid until the next delivery is requested, or stream or subscriber
    is closed; kernels that read them must be launched by then, on the stream that is current then or on one that it
    waits for.

    With `subscriber.borrow` they are views of the daemon's slot: never write to them, nor touch them after that.
    Until then they do not change, whatever happens to the session: the daemon never refills a borrowed slot, and the
    memory of a dead worker stays mapped here.
    """

    __slots__ = ("batch", "final", "taps")

    def __init__(self, batch: Batch, taps: torch.Tensor | None = None, final: torch.Tensor | None = None) -> None:
        self.batch = batch
        self.taps = taps
        self.final = final

    def __repr__(self) -> str:
        return f"Delivery(epoch {self.batch.epoch}, index {self.batch.index}, {self.batch.num_tokens} tokens)"
