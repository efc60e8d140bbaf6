"""Messages between control and worker, internal to one daemon; no trainer sees them.

Two one-way pipes per worker life, bound by control: one to the worker, one from it. Either side may be a process or a
thread of the same one; the messages are the same.
"""

from __future__ import annotations

from typing import Any

import msgspec

from specd.protocol.batch import Layout
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import ReplayInfo, RingInfo, TargetContract
from specd.transports.base import SlotRef


class Note(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all internal messages."""


# Control → worker


class FillSlot(Note, kw_only=True, frozen=True, tag="fill"):
    """Capture one batch into a slot. tokens, lengths: int32 little-endian. payloads, keep: as in SUBMIT. content: its
    content id.
    """

    slot: int
    generation: int
    spec: CaptureSpec
    tokens: bytes
    lengths: bytes
    layout: Layout
    payloads: tuple[bytes, ...] = ()
    content: bytes = b""
    keep: bool = True


class FillNoise(Note, kw_only=True, frozen=True, tag="noise"):
    """Fill a slot with the bytes of a probe."""

    slot: int
    generation: int
    nonce: bytes
    nbytes: int


class Accept(Note, kw_only=True, frozen=True, tag="accept"):
    """Attach a session to a transport."""

    session: bytes
    transport: str
    hello: bytes


class Publish(Note, kw_only=True, frozen=True, tag="publish"):
    """A session is ready to receive a slot it leases."""

    session: bytes
    transport: str
    ref: SlotRef


class Drop(Note, kw_only=True, frozen=True, tag="drop"):
    """Drop a session that ended."""

    session: bytes


class ReadArtifact(Note, kw_only=True, frozen=True, tag="read_artifact"):
    """Read bytes of a target artifact for a session."""

    session: bytes
    name: str
    offset: int
    length: int


class SaveSlot(Note, kw_only=True, frozen=True, tag="save"):
    """Copy a slot to a cell of the lag window. number: of this copy, for SAVED."""

    number: int
    slot: int
    generation: int
    cell: int


class LoadSlot(Note, kw_only=True, frozen=True, tag="load"):
    """Fill a slot from a cell of the lag window, behind what was asked for that cell before."""

    slot: int
    generation: int
    cell: int


class Lasts(Note, kw_only=True, frozen=True, tag="lasts"):
    """A kept batch that nobody asked for during so many lookups is old."""

    lookups: int


class Stop(Note, kw_only=True, frozen=True, tag="stop"):
    """End the worker."""


# Worker → control


class Started(Note, kw_only=True, frozen=True, tag="started"):
    """The target is loaded and the ring's memory exists. segment: the shared segment's path, empty if private.

    cutting: those of the transports that take pieces of a slot. replay: what is kept over epochs. lag_cells: of the lag
    window.
    """

    contract: TargetContract
    ring: RingInfo
    transports: tuple[str, ...]
    cutting: tuple[str, ...]
    segment: str
    load_s: float
    replay: ReplayInfo | None = None
    lag_cells: int = 0


class StartFailed(Note, kw_only=True, frozen=True, tag="start_failed"):
    """The worker cannot start; the reason is meant for a person."""

    reason: str


class Filled(Note, kw_only=True, frozen=True, tag="filled"):
    """A slot's bytes are in place. target_us: its share, by tokens, of the forward that wrote them. replayed: none did,
    they were kept.
    """

    slot: int
    generation: int
    target_us: int
    replayed: bool = False


class ReplayCounts(Note, kw_only=True, frozen=True, tag="replay_counts"):
    """What became of batches that are, or could be, kept over epochs, since the last such note.

    counts: by the names of `replay.store.COUNTS`. The rest as of ReplayInfo.
    """

    cells: int
    used: int
    counts: dict[str, int]
    failed: str = ""


class Saved(Note, kw_only=True, frozen=True, tag="saved"):
    """The answer to SaveSlot. ok: the slot was not filled anew under the copy."""

    number: int
    ok: bool


class FillFailed(Note, kw_only=True, frozen=True, tag="fill_failed"):
    """A slot could not be filled; the worker lives on."""

    slot: int
    generation: int
    reason: str


class Accepted(Note, kw_only=True, frozen=True, tag="accepted"):
    """The answer to Accept."""

    session: bytes
    transport: str
    offer: bytes


class Refused(Note, kw_only=True, frozen=True, tag="refused"):
    """The answer to Accept, when it failed."""

    session: bytes
    transport: str
    reason: str


class ArtifactBytes(Note, kw_only=True, frozen=True, tag="artifact_bytes"):
    """The answer to ReadArtifact."""

    session: bytes
    name: str
    offset: int
    data: bytes


ToWorker = FillSlot | FillNoise | SaveSlot | LoadSlot | Accept | Publish | Drop | ReadArtifact | Lasts | Stop
ToControl = Started | StartFailed | Filled | ReplayCounts | Saved | FillFailed | Accepted | Refused | ArtifactBytes

_decoder: msgspec.msgpack.Decoder[ToWorker | ToControl] = msgspec.msgpack.Decoder(ToWorker | ToControl)
encode = msgspec.msgpack.Encoder().encode


def decode(frame: bytes) -> Any:
    """The message in one frame; only for frames of this daemon."""
    return _decoder.decode(frame)
