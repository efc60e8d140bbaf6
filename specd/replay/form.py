"""What a store's file looks like: a page that says whose states it holds, then equal cells of one batch each.

    page 0    magic 8s · version u32 · length of the identity u32 · cell_bytes u64 · cells u64 · the identity as JSON ·
              zeros · in the last 8 bytes the xxh3-64 of all before them                          (little-endian)
    cell i    begins at PAGE + i · (PAGE + cell_bytes)
      header  magic 8s · cell u64 · key 32s · nbytes u64 · tokens u64 · xxh3-64 of key and image u64 · zeros · in the
              last 8 bytes the xxh3-64 of all before them; all zeros where there is no batch
      image   `nbytes` bytes, zeros up to a whole page

There is no index: what a cell holds stands in its header, with its own number, so that one in a wrong place is damage.
What was torn fails a checksum, so nothing has to be flushed.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

import msgspec
import xxhash

from specd.errors import ConfigError

PAGE: Final = 4096
VERSION: Final = 1
"""Raise it whenever bytes, or the states of a target under the same identity, become others."""
_MAGIC: Final = b"specdrpl"
_CELL: Final = b"specdcel"
_SUPER: Final = struct.Struct("<8sIIQQ")
_HEADER: Final = struct.Struct("<8sQ32sQQQ")
_SUM: Final = struct.Struct("<Q")
_BODY: Final = PAGE - _SUM.size
_EMPTY: Final = bytes(PAGE)


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose states a store holds: all that their bytes depend on beside a batch and what is captured of it.

    model: for people. fingerprint: of the target. backend, torch: with their versions. device: what computes. exact,
    tp, attention, graphs: settings of the target. encoding: of the images; `raw` are the bytes of a slot,
    float8_e4m3fn those of the same batch in that dtype.
    """

    model: str
    fingerprint: str
    backend: str
    torch: str
    device: str
    exact: bool
    tp: int = 1
    attention: str = "auto"
    graphs: str = "False"
    encoding: str = "raw"

    def __str__(self) -> str:
        how = f"{'exact' if self.exact else 'merged'}{f', tp {self.tp}' if self.tp > 1 else ''}"
        kept = "" if self.encoding == "raw" else f", kept as {self.encoding}"
        return f"{self.model} on {self.backend}, {how}, {self.device}, torch {self.torch}{kept}"

    def unlike(self, other: Identity) -> list[str]:
        """The names of what differs."""
        return [name for name in self.__struct_fields__ if name != "model" and self._tells(other, name)]

    def _tells(self, other: Identity, name: str) -> bool:
        return bool(getattr(self, name) != getattr(other, name))


class Super(NamedTuple):
    """What page 0 says. cell_bytes: of a cell's image, whole pages."""

    identity: Identity
    cells: int
    cell_bytes: int


class Header(NamedTuple):
    """What a cell's header says. digest: of key and image."""

    key: bytes
    nbytes: int
    tokens: int
    digest: int


class DamageError(Exception):
    """A page that does not hold what was written; never leaves this package."""


def stride(cell_bytes: int) -> int:
    """Bytes from one cell to the next."""
    return PAGE + cell_bytes


def offset(cell: int, cell_bytes: int) -> int:
    """Where a cell begins in the file."""
    return PAGE + cell * stride(cell_bytes)


def whole_pages(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


def digest_of(key: bytes, image: memoryview) -> int:
    """The checksum of a batch under its key; it lets other threads run."""
    state = xxhash.xxh3_64(key)
    state.update(image)
    return state.intdigest()


def pack_super(page: Super) -> bytes:
    """Page 0. Raises ConfigError for an identity that it has no room for."""
    identity = msgspec.json.encode(page.identity)
    if len(identity) > _BODY - _SUPER.size:
        raise ConfigError(
            f"a store's identity has {len(identity)} bytes, at most {_BODY - _SUPER.size} fit: {identity!r}"
        )
    return _sealed(_SUPER.pack(_MAGIC, VERSION, len(identity), page.cell_bytes, page.cells) + identity)


def parse_super(page: bytes) -> Super | None:
    """What page 0 says; None for one that was never written. Raises DamageError with the reason."""
    if page == _EMPTY:
        return None
    magic, version, length, cell_bytes, cells = _SUPER.unpack_from(page)
    if magic != _MAGIC:
        raise DamageError("it is no store of specd's")
    if version != VERSION:
        raise DamageError(f"it has version {version}, this specd writes {VERSION}")
    if not _intact(page):
        raise DamageError("its first page is damaged")
    try:
        identity = msgspec.json.decode(page[_SUPER.size : _SUPER.size + length], type=Identity)
    except msgspec.MsgspecError as error:
        raise DamageError(f"its first page cannot be read: {error}") from None
    return Super(identity, cells, cell_bytes)


def pack_header(cell: int, header: Header) -> bytes:
    """The header page of a cell."""
    return _sealed(_HEADER.pack(_CELL, cell, header.key, header.nbytes, header.tokens, header.digest))


def parse_header(page: bytes, cell: int) -> Header | None:
    """What the header of a cell says; None where there is no batch. Raises DamageError."""
    if page == _EMPTY:
        return None
    magic, number, key, nbytes, tokens, digest = _HEADER.unpack_from(page)
    if magic != _CELL or number != cell or not _intact(page):
        raise DamageError(f"the header of cell {cell} is damaged")
    return Header(key, nbytes, tokens, digest)


def _sealed(body: bytes) -> bytes:
    body = body.ljust(_BODY, b"\0")
    return body + _SUM.pack(xxhash.xxh3_64_intdigest(body))


def _intact(page: bytes) -> bool:
    return bool(_SUM.unpack_from(page, _BODY)[0] == xxhash.xxh3_64_intdigest(page[:_BODY]))
