"""Admission: checks a trainer's requests against the target and the ring. Pure functions, no state."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from specd.daemon.slots import Grant, Lease
from specd.errors import ProtocolError
from specd.protocol import limits, payload
from specd.protocol import messages as wire
from specd.protocol.batch import Layout, batch_id, slot_bytes, slot_layout
from specd.protocol.capture import CaptureSpec, union
from specd.protocol.contract import RingInfo, TargetContract
from specd.protocol.cut import Piece, cut
from specd.transports.base import SlotRef
from specd.worker import messages as channel

Tokens = np.ndarray[Any, np.dtype[np.int32]]


class Request:
    """One admitted request of a session. want: its states, None for a probe. layout: of these. place: in its plan."""

    __slots__ = ("_message", "batch_id", "layout", "place", "want")

    def __init__(
        self, message: wire.Submit | wire.Probe, identity: bytes, layout: Layout, want: CaptureSpec | None = None
    ) -> None:
        self._message: wire.Submit | wire.Probe | None = message
        self.want = want
        self.place = message.place if isinstance(message, wire.Submit) else 0
        self.batch_id = identity
        self.layout = layout

    def task(self, fill: Grant) -> channel.FillSlot | channel.FillNoise | channel.LoadSlot:
        """The worker's task for this request, to get all that is held. Call it once: it drops the tokens."""
        message, self._message = self._message, None
        assert message is not None, "a request is given a slot once"
        if fill.cell is not None:
            return channel.LoadSlot(slot=fill.slot, generation=fill.generation, cell=fill.cell)
        if isinstance(message, wire.Probe):
            return channel.FillNoise(
                slot=fill.slot, generation=fill.generation, nonce=message.nonce, nbytes=message.nbytes
            )
        assert fill.held is not None, "only a probe wants nothing"
        num_tokens, *_, hidden_size = self.layout.tensors[0].shape
        return channel.FillSlot(
            slot=fill.slot,
            generation=fill.generation,
            spec=fill.held,
            tokens=message.tokens,
            lengths=message.lengths,
            payloads=message.payloads,
            content=self.batch_id,
            keep=message.keep,
            layout=slot_layout(fill.held, hidden_size, num_tokens),
        )

    def ref(self, lease: Lease) -> SlotRef:
        """Where its own states lie, and how they are cut out of what its lease's slot holds."""
        pieces: tuple[Piece, ...] = ()
        if self.want is not None and lease.held is not None:
            num_tokens, *_, hidden_size = self.layout.tensors[0].shape
            pieces = cut(lease.held, self.want, hidden_size, num_tokens)
        return SlotRef(lease.slot, lease.generation, self.layout.nbytes, pieces)

    def ready(self, lease: Lease, epoch: bytes, busy_slots: int, target_us: int, *, replayed: bool) -> wire.Ready:
        """What tells the trainer that its states are in place. replayed: they were kept from an earlier epoch."""
        return wire.Ready(
            epoch=epoch,
            seq=lease.seq,
            batch_id=lease.batch_id,
            lease=lease.id,
            slot=lease.slot,
            generation=lease.generation,
            layout=self.layout,
            busy_slots=busy_slots,
            target_us=target_us,
            held=lease.held,
            source="replay" if replayed and lease.source == "forward" else lease.source,
        )


class Unfit(Exception):
    """A well-formed request that this daemon can never serve; the message tells the trainer why."""


def check_hello(
    hello: wire.Hello,
    contract: TargetContract,
    ring: RingInfo,
    wanted: Sequence[CaptureSpec] = (),
    *,
    exact: bool = False,
) -> str | None:
    """Why a trainer's HELLO does not match this target and ring, or None if it does. wanted: by others of its share.

    exact: its target is to give the states of a local run, to the bit.
    """
    if hello.fingerprint not in {"", contract.fingerprint}:
        return (
            f"this daemon's target is not the trainer's: it serves {contract.model} ({contract.fingerprint}), the "
            f"trainer needs ({hello.fingerprint})"
        )
    if exact and hello.spec.scaled:
        return (
            f"the trainer asks for states in {hello.spec.dtype}, which rounds them, and this daemon's target is exact: "
            f"leave out capture.dtype={hello.spec.dtype}, or start the daemon without --exact"
        )
    strange = _strange_payloads(hello.payloads, contract, ring) or hello.spec.problem(contract.num_layers)
    return strange or _unlike_share(hello, wanted, contract, ring)


def check_attach(transport: str, share: str, started: channel.Started) -> str | None:
    """Why a trainer may not use a transport, or None if it may try."""
    if transport not in started.transports:
        return f"the daemon does not serve it (it serves {', '.join(started.transports)})"
    if share and transport not in started.cutting:
        able = ", ".join(started.cutting) or "none"
        return f"it cannot cut a trainer's own states out of what a share captures ({able} can); leave out --share"
    return None


def admit_batch(
    message: wire.Submit, spec: CaptureSpec, contract: TargetContract, ring: RingInfo, *, shared: bool = False
) -> Request:
    """Check a SUBMIT and return its Request. Raises ProtocolError if forged or malformed, Unfit if out of bounds.

    shared: more than its spec may be captured.
    """
    tokens, lengths = _ints(message.tokens, "tokens"), _ints(message.lengths, "lengths")
    if tokens.size == 0 or lengths.size == 0 or lengths.min() < 1 or lengths.sum(dtype=np.int64) != tokens.size:
        raise ProtocolError(f"{lengths.size} lengths do not cover {tokens.size} tokens with positive parts")
    _check_payloads(message.payloads, lengths.size)
    identity = batch_id(contract.fingerprint, tokens, lengths, message.payloads)
    if message.batch_id != identity:
        raise ProtocolError(f"batch id {message.batch_id.hex()} is not that of its content, {identity.hex()}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= contract.vocab_size:
        raise Unfit(
            f"token id {low if low < 0 else high} is outside the target's vocabulary of {contract.vocab_size}: "
            f"tokenise the data with the target's own tokenizer"
        )
    if (brought := payload.total_bytes(message.payloads)) > ring.payload_bytes:
        raise Unfit(
            f"the payloads of {lengths.size} sequences have {brought} bytes, and the daemon takes {ring.payload_bytes} "
            f"a batch: start it with a larger ring.payload_mib, or train with a smaller data.batch_tokens"
        )
    layout = slot_layout(spec, contract.hidden_size, tokens.size)
    if layout.nbytes > ring.slot_bytes:
        wider = "a wider capture.num_taps, capture.final or capture.dtype"  # than what these tokens would fit in
        larger = "a larger ring.slot_tokens" if tokens.size > ring.slot_tokens else wider
        raise Unfit(
            f"{tokens.size} tokens need {layout.nbytes} bytes and a slot has {ring.slot_bytes} (sized for "
            f"{ring.slot_tokens} tokens of the daemon's capture): start the daemon with {larger}, or train with a "
            f"smaller data.batch_tokens"
        )
    if shared and tokens.size > ring.slot_tokens:
        raise Unfit(
            f"{tokens.size} tokens in a share, and the states of all its trainers fit a slot up to {ring.slot_tokens}: "
            f"start the daemon with a larger ring.slot_tokens, or train with a smaller data.batch_tokens"
        )
    return Request(message, identity, layout, spec)


def admit_probe(message: wire.Probe, session: bytes, ring: RingInfo) -> Request:
    """Check a PROBE and return its Request; no two share content. Raises ProtocolError when it does not fit a slot."""
    if not 0 < message.nbytes <= ring.slot_bytes:
        raise ProtocolError(f"a probe of {message.nbytes} bytes does not fit a slot of {ring.slot_bytes}")
    facts = b"|".join((session, message.nonce, str(message.nbytes).encode()))
    identity = hashlib.blake2b(facts, digest_size=limits.BATCH_ID_BYTES, person=b"specd probe").digest()
    return Request(message, identity, Layout(tensors=(), nbytes=message.nbytes))


def check_fetch(message: wire.Fetch, contract: TargetContract, in_flight: int) -> None:
    """Raise ProtocolError unless the artifact exists and has those bytes.

    in_flight: unanswered reads of the same session, at most MAX_FETCHES.
    """
    if in_flight >= limits.MAX_FETCHES:
        raise ProtocolError(f"{in_flight} artifact reads are in flight already: wait for their answers")
    artifact = contract.artifacts.get(message.name)
    if artifact is None:
        raise ProtocolError(f"the target has no artifact {message.name!r}")
    end = message.offset + message.length
    if not 0 < message.length <= limits.ARTIFACT_CHUNK_BYTES or message.offset < 0 or end > artifact.nbytes:
        raise ProtocolError(
            f"bytes {message.offset}…{end} of artifact {message.name!r} ({artifact.nbytes} bytes) cannot be fetched; "
            f"at most {limits.ARTIFACT_CHUNK_BYTES} at once"
        )


def _check_payloads(payloads: Sequence[bytes], sequences: int) -> None:
    """Raise ProtocolError unless there is one payload for each sequence, or none at all."""
    if payloads and (len(payloads) != sequences or not any(payloads)):
        raise ProtocolError(
            f"{len(payloads)} payloads, {sum(map(bool, payloads))} of them not empty, for {sequences} sequences: "
            f"expected one for each, or none if none brings anything"
        )
    for each in payloads:
        payload.unpack(each)


def _strange_payloads(names: Sequence[str], contract: TargetContract, ring: RingInfo) -> str | None:
    """Why a target does not take what sequences bring beside their tokens, or None if it does."""
    if not names:
        return None
    brought = f"the trainer's sequences bring {', '.join(names)} for the target"
    if not contract.payloads:
        return (
            f"{brought}, as of images, and {contract.model} takes text alone here: train on text, or start the daemon "
            f"with a target that takes images (--backend transformers)"
        )
    if unknown := sorted(set(names) - set(contract.payloads)):
        return f"{brought}, and {contract.model} takes {', '.join(contract.payloads)}, not {', '.join(unknown)}"
    if not ring.payload_bytes:
        return f"{brought}, and the daemon is set to take text alone: start it with --set ring.payload_mib=64"
    return None


def _unlike_share(
    hello: wire.Hello, wanted: Sequence[CaptureSpec], contract: TargetContract, ring: RingInfo
) -> str | None:
    """Why a trainer cannot share forwards with those whose specs are wanted, or None if it can, or need not."""
    if not hello.share:
        return None
    share = f"share {hello.share}"
    if others := {spec.dtype for spec in wanted} - {hello.spec.dtype}:
        return f"{share} captures {others.pop()}, this trainer wants {hello.spec.dtype}: give it another share, or none"
    spec = union([hello.spec, *wanted])
    if slot_bytes(spec, contract.hidden_size, ring.slot_tokens) > ring.slot_bytes:
        return (
            f"{share} would capture {spec.title} = {spec.bytes_per_token(contract.hidden_size):,} bytes a token; "
            f"slots hold {ring.slot_bytes // ring.slot_tokens:,}: specd start --set {' --set '.join(spec.sizing)}"
        )
    return None


def _ints(data: bytes, name: str) -> Tokens:
    """Little-endian int32s of a message field, not copied."""
    if len(data) % 4:
        raise ProtocolError(f"{name} has {len(data)} bytes, expected a multiple of 4 (int32)")
    return np.frombuffer(data, "<i4")
