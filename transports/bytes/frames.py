"""Frames of the bytes transport: a fixed header, followed by a part of a slot in a CHUNK.

A message is the header, then for CHUNK one payload of `length` bytes. Header, 56 bytes little-endian:

    magic 4s · version u8 · kind u8 · zero u16 · slot u32 · length u32 · transfer u64 · generation u64 · offset u64 ·
    total u64 · checksum u64

| kind    | way     | fields that count (the others are 0) |
|---------|---------|--------------------------------------|
| HELLO   | trainer | none: the routing id is the token    |
| WELCOME | daemon  | none                                 |
| CHUNK   | daemon  | all; checksum: XXH3-64 of the payload|
| GONE    | daemon  | slot, generation: it is not there any more |
| TAKEN   | trainer | total: CHUNK and GONE messages taken so far |
| CANCEL  | trainer | transfer: no longer wanted           |
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from typing import Final, NamedTuple

import xxhash

CHUNK_BYTES: Final = 4 << 20
WINDOW: Final = 4
"""Up to this many chunks of a session are in flight: bounds what a slow trainer makes either side hold."""
MAGIC: Final = b"spcB"
VERSION: Final = 1
_STRUCT: Final = struct.Struct("<4sBBHIIQQQQQ")
HEADER_BYTES: Final = _STRUCT.size

checksum: Callable[[memoryview], int] = xxhash.xxh3_64_intdigest
"""XXH3-64 of a payload: at 18 GB/s, against 3.5 of zlib.crc32, it does not set the transport's pace."""


class Kind(enum.IntEnum):
    HELLO = 1
    WELCOME = 2
    CHUNK = 3
    GONE = 4
    TAKEN = 5
    CANCEL = 6


class Header(NamedTuple):
    """The fields of one header; see the module."""

    kind: Kind
    slot: int = 0
    length: int = 0
    transfer: int = 0
    generation: int = 0
    offset: int = 0
    total: int = 0
    checksum: int = 0

    def pack(self) -> bytes:
        return _STRUCT.pack(MAGIC, VERSION, self.kind, 0, *self[1:])


def unpack(frame: bytes) -> Header | None:
    """The header in a frame, or None when it is not one of this version."""
    if len(frame) != HEADER_BYTES:
        return None
    magic, version, kind, zero, *fields = _STRUCT.unpack(frame)
    if magic != MAGIC or version != VERSION or zero or not Kind.HELLO <= kind <= Kind.CANCEL:
        return None
    return Header(Kind(kind), *fields)
