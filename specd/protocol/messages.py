"""The control protocol between daemon and trainer: messages, versioned framing, one decoder. See docs/protocol.md.

A message is one ZeroMQ frame: the version byte, then one msgpack map with the key `type`. Nothing here needs torch.
Every field is bounded here as far as one message alone can tell; limits that depend on the session, the target or the
ring are checked where those are known.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from specd.errors import ProtocolError
from specd.protocol.batch import Layout
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import ReplayInfo, RingInfo, TargetContract
from specd.protocol.limits import (
    ARTIFACT_CHUNK_BYTES,
    EPOCH_BYTES,
    MAX_HELLO_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_NAME_CHARS,
    MAX_OFFER_BYTES,
    MAX_PAYLOAD_BYTES,
    RUN_BYTES,
    U64,
    BatchId,
    Int31,
    Int32s,
    Name,
    Names,
    Payloads,
    Positive,
    Reason,
    Share,
)

VERSION = 5

Source = Literal["forward", "joined", "kept", "replay"]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages. epoch: the worker life this message belongs to; empty where none is known yet."""

    epoch: bytes = b""

    def __post_init__(self) -> None:
        if len(self.epoch) not in (0, EPOCH_BYTES):
            raise ValueError(f"an epoch of {len(self.epoch)} bytes: expected {EPOCH_BYTES}, or none")


class SessionStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One trainer as STATUS shows it. session: a name of it that opens nothing. gpus: as in its HELLO. counts are since
    then. run: a name of its run that opens nothing, empty for a trainer of its own. ranks: that run's, here. share: as
    in its HELLO. behind: the others of its share do not wait for it.
    """

    session: str
    name: str
    transport: str
    gpus: tuple[str, ...]
    credits: int
    outstanding: int
    leases: int
    batches: int
    nbytes: int
    age_s: float
    tokens: int = 0
    run: str = ""
    ranks: int = 1
    share: str = ""
    behind: bool = False


# Trainer → daemon


class Hello(Message, kw_only=True, frozen=True, tag="hello"):
    """Open or reopen a session. name: for people. pid: 0 if unknown. host: identity of kernel and namespaces.

    credits: how many batches the trainer wants outstanding. fingerprint: the target it must be, empty for any.
    payloads: names of the arrays that its sequences bring; none for text alone. run: equal on all ranks of one
    training, empty for one alone. ranks: how many of them come to this daemon. share: runs that name the same one share
    forwards; empty for none. epoch_batches: how many batches its run has in an epoch, 0 if unknown.
    """

    name: Name
    host: Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
    pid: Int31
    gpus: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    transports: Names
    spec: CaptureSpec
    credits: Positive
    fingerprint: Annotated[str, Meta(max_length=1000)] = ""
    payloads: Names = ()
    run: Annotated[bytes, Meta(max_length=RUN_BYTES)] = b""
    ranks: Positive = 1
    share: Share = ""
    epoch_batches: U64 = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.run) not in (0, RUN_BYTES):
            raise ValueError(f"a run of {len(self.run)} bytes: expected {RUN_BYTES}, or none")
        if self.ranks > 1 and not self.run:
            raise ValueError(f"{self.ranks} ranks of no run: expected its {RUN_BYTES} bytes, or 1 rank")


class Attach(Message, kw_only=True, frozen=True, tag="attach"):
    """Ask to use one transport. hello: that transport's own facts about the trainer."""

    transport: Name
    hello: Annotated[bytes, Meta(max_length=MAX_HELLO_BYTES)] = b""


class Probe(Message, kw_only=True, frozen=True, tag="probe"):
    """Ask for a slot filled with `nbytes` pseudo-random bytes grown from `nonce`; answered like SUBMIT."""

    seq: U64
    nonce: Annotated[bytes, Meta(min_length=8, max_length=64)]
    nbytes: Annotated[int, Meta(ge=1)]


class Submit(Message, kw_only=True, frozen=True, tag="submit"):
    """Ask for one batch. seq: the trainer's number for it, echoed back. tokens, lengths: int32 little-endian.

    payloads: one for each sequence, empty for one that has none; none at all if no sequence has any. place: where
    it stands in its run's plan, higher for a later batch. keep: whether this daemon may keep its states for
    later epochs.
    """

    seq: U64
    batch_id: BatchId
    tokens: Int32s
    lengths: Int32s
    payloads: Payloads = ()
    place: U64 = 0
    keep: bool = True


class RecvReady(Message, kw_only=True, frozen=True, tag="recv_ready"):
    """The trainer has a buffer for a leased slot; the worker may send it."""

    lease: U64


class Borrow(Message, kw_only=True, frozen=True, tag="borrow"):
    """The trainer reads a leased slot in place until it RELEASEs it: if its session ends first, the slot is filled
    again only when its process is dead. Not answered; refused for a process the daemon cannot watch.
    """

    lease: U64


class Release(Message, kw_only=True, frozen=True, tag="release"):
    """The trainer is done with a leased slot. Not answered: a lease that is over already is no error."""

    lease: U64


class Renew(Message, kw_only=True, frozen=True, tag="renew"):
    """Renew every lease of the session; answered with Renewed. epoch_batches: as in Hello, since it is known; 0 for as
    before.
    """

    epoch_batches: U64 = 0


class Fetch(Message, kw_only=True, frozen=True, tag="fetch"):
    """Ask for `length` bytes of a target artifact at `offset`; at most ARTIFACT_CHUNK_BYTES."""

    name: Name
    offset: U64
    length: Annotated[int, Meta(ge=1, le=ARTIFACT_CHUNK_BYTES)]


class Status(Message, kw_only=True, frozen=True, tag="status"):
    """Ask for the daemon's status. Needs no session."""


class Bye(Message, kw_only=True, frozen=True, tag="bye"):
    """Close the session and free all it holds."""


# Daemon → trainer


class Welcome(Message, kw_only=True, frozen=True, tag="welcome"):
    """The session is open. credits: granted. slots: how many slots it can hold at most; one is always its own.

    sharing: how many other runs its share has now. replay: what it keeps over epochs, None for nothing.
    """

    contract: TargetContract
    ring: RingInfo
    credits: Positive
    slots: Positive
    lease_ttl_ms: Positive
    transports: Names
    sharing: Int31 = 0
    replay: ReplayInfo | None = None


class Reject(Message, kw_only=True, frozen=True, tag="reject"):
    """HELLO refused. retry_ms: 0 when a retry is useless, else the delay before it.

    loading_ms: while the worker starts, the longest that it may take from now; else 0.
    """

    reason: Reason
    retry_ms: Int31 = 0
    loading_ms: Int31 = 0


class Offer(Message, kw_only=True, frozen=True, tag="offer"):
    """ATTACH granted. offer: what that transport's client needs."""

    transport: Name
    offer: Annotated[bytes, Meta(max_length=MAX_OFFER_BYTES)]


class Refuse(Message, kw_only=True, frozen=True, tag="refuse"):
    """ATTACH refused."""

    transport: Name
    reason: Reason


class Ready(Message, kw_only=True, frozen=True, tag="ready"):
    """A batch lies in its slot. busy_slots: slots in use now, for display. target_us: its share of its forward.

    layout: of the trainer's own states, which it cuts out of what is held there; None for a probe. source: whether the
    forward was made for this request, was joined, lay kept for its share, or was replayed: its states were kept from an
    earlier one.
    """

    seq: U64
    batch_id: BatchId
    lease: U64
    slot: Int31
    generation: Annotated[int, Meta(ge=1)]
    layout: Layout
    busy_slots: Int31
    target_us: U64
    held: CaptureSpec | None = None
    source: Source = "forward"


class Failed(Message, kw_only=True, frozen=True, tag="failed"):
    """A batch cannot be captured. retry: whether a retry may succeed."""

    seq: U64
    batch_id: BatchId
    reason: Reason
    retry: bool


class Revoke(Message, kw_only=True, frozen=True, tag="revoke"):
    """The session is over: every lease and request of it is void. Say HELLO again to go on."""

    reason: Reason


class Renewed(Message, kw_only=True, frozen=True, tag="renewed"):
    """Answer to RENEW."""


class Artifact(Message, kw_only=True, frozen=True, tag="artifact"):
    """Answer to FETCH: bytes of the artifact at `offset`."""

    name: Name
    offset: U64
    data: Annotated[bytes, Meta(max_length=ARTIFACT_CHUNK_BYTES)]


class StatusReport(Message, kw_only=True, frozen=True, tag="status_report"):
    """Answer to STATUS. state: starting, serving, draining. slots: how many are in each state.

    transports: what the worker serves, empty while none does. loading_ms: as in Reject. max_sessions: trainers at once.
    replay: as in Welcome. lag_cells, lag_used: batches that the lag window has room for, and has.
    """

    state: str
    version: str
    pid: int
    worker_pid: int
    uptime_s: float
    contract: TargetContract | None
    ring: RingInfo | None
    slots: dict[str, int]
    queued: int
    sessions: tuple[SessionStatus, ...]
    counters: dict[str, int]
    endpoints: tuple[str, ...]
    transports: tuple[str, ...]
    loading_ms: Int31 = 0
    max_sessions: Int31 = 0
    replay: ReplayInfo | None = None
    lag_cells: Int31 = 0
    lag_used: Int31 = 0


class Error(Message, kw_only=True, frozen=True, tag="error"):
    """The peer's last message was refused; nothing else changed."""

    reason: Reason


ToDaemon = Hello | Attach | Probe | Submit | RecvReady | Borrow | Release | Renew | Fetch | Status | Bye
ToTrainer = Welcome | Reject | Offer | Refuse | Ready | Failed | Revoke | Renewed | Artifact | StatusReport | Error

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[ToDaemon] = msgspec.msgpack.Decoder(ToDaemon)
_replies: msgspec.msgpack.Decoder[ToTrainer] = msgspec.msgpack.Decoder(ToTrainer)


def encode(message: Message) -> bytes:
    """The frame of one message. Raises ProtocolError when it is longer than any peer accepts."""
    frame = bytes((VERSION,)) + _encoder.encode(message)
    limit = MAX_MESSAGE_BYTES + (MAX_PAYLOAD_BYTES if isinstance(message, Submit) and message.payloads else 0)
    if len(frame) > limit:
        raise ProtocolError(f"a {type(message).__name__} of {len(frame)} bytes exceeds the limit of {limit} a message")
    return frame


def decode_request(frame: bytes | memoryview) -> Any:
    """The trainer's message in one frame. Raises ProtocolError that says what is wrong with it."""
    return _decode(frame, _requests)


def decode_reply(frame: bytes | memoryview) -> Any:
    """The daemon's message in one frame. Raises ProtocolError that says what is wrong with it."""
    return _decode(frame, _replies)


def _decode(frame: bytes | memoryview, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    view = memoryview(frame)
    if len(view) == 0:
        raise ProtocolError("empty frame: expected a version byte and a message")
    if view[0] != VERSION:
        raise ProtocolError(f"protocol version {view[0]} is not {VERSION}: run the same specd version on both sides")
    try:
        return decoder.decode(view[1:])
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message of this protocol: {str(error)[:500]}") from None
