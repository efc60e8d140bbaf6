"""Payloads: what a sequence brings for the target beside its tokens, as the features of its images.

Named arrays, as the target's processor makes them. On the wire and in a batch's content id a payload is one string of
bytes, which only the target looks into.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from specd.errors import ProtocolError
from specd.protocol.limits import MAX_ARRAYS, MAX_DIMENSIONS, MAX_PAYLOAD_BYTES, Name

ArrayDtype = Literal["float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"]
ITEM_BYTES: dict[str, int] = {
    "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1,
}  # fmt: skip
DIGEST_BYTES = 16
Dimension = Annotated[int, Meta(ge=0, le=MAX_PAYLOAD_BYTES)]
"""Bounded where another one is 0, too: tensors of such shapes overflow."""


class Array(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One array of a payload. data: row-major, little-endian."""

    dtype: ArrayDtype
    shape: Annotated[tuple[Dimension, ...], Meta(max_length=MAX_DIMENSIONS)]
    data: Annotated[memoryview, Meta(max_length=MAX_PAYLOAD_BYTES)]

    def __post_init__(self) -> None:
        if self.data.nbytes != self.nbytes:
            raise ValueError(
                f"{self.data.nbytes} bytes of {self.dtype} {list(self.shape)}: expected {self.nbytes} of them"
            )

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


Payload = Mapping[str, Array]
"""The arrays of one sequence, by name; empty for text alone."""

_decoder: msgspec.msgpack.Decoder[dict[str, Array]] = msgspec.msgpack.Decoder(
    Annotated[dict[Name, Array], Meta(min_length=1, max_length=MAX_ARRAYS)]
)
_encoder = msgspec.msgpack.Encoder(order="sorted")


def pack(payload: Payload) -> bytes:
    """A payload's bytes, the same for the same arrays; none for an empty one."""
    return _encoder.encode(payload) if payload else b""


def unpack(data: bytes) -> dict[str, Array]:
    """The arrays in a payload's bytes, as views of them. Raises ProtocolError that says what is wrong with it."""
    if not data:
        return {}
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a payload: {str(error)[:500]}") from None


def total_bytes(payloads: Sequence[bytes]) -> int:
    """Bytes of all payloads of a batch."""
    return sum(map(len, payloads))


def digests(payloads: Sequence[bytes]) -> bytes:
    """The digests of a batch's payloads, one behind the other; none for a batch without."""
    return b"".join(hashlib.blake2b(payload, digest_size=DIGEST_BYTES).digest() for payload in payloads)
