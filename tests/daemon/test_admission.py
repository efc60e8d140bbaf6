"""Admission: what a request must be to get a place in the ring, and what each refusal says."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import numpy as np
import pytest

from specd.daemon.admission import Unfit, admit_batch, admit_probe, check_attach, check_fetch, check_hello
from specd.daemon.slots import Grant, Lease
from specd.errors import ProtocolError
from specd.protocol import messages as wire
from specd.protocol.batch import batch_id, slot_bytes, slot_layout
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import ArtifactRef, RingInfo, TargetContract
from specd.protocol.cut import cut
from specd.protocol.limits import ARTIFACT_CHUNK_BYTES, MAX_FETCHES
from specd.protocol.payload import Array, pack
from specd.worker.messages import FillNoise, FillSlot, Started

CONTRACT = TargetContract(
    model="tiny", model_type="llama", hidden_size=8, num_layers=6, vocab_size=50, dtype="float32", weights="w",
    artifacts={"embedding": ArtifactRef(nbytes=2 * ARTIFACT_CHUNK_BYTES)},
)  # fmt: skip
SPEC = CaptureSpec(taps=(1, 3), dtype="float32")
RING = RingInfo(num_slots=4, slot_bytes=slot_bytes(SPEC, 8, 64), slot_tokens=64)


def submit(content: list[int], lengths: list[int] | None = None, **changes: Any) -> wire.Submit:
    ids, sizes = np.array(content, "<i4"), np.array(lengths or [len(content)], "<i4")
    message = wire.Submit(
        seq=7, batch_id=batch_id(CONTRACT.fingerprint, ids, sizes), tokens=ids.tobytes(), lengths=sizes.tobytes()
    )
    return msgspec.structs.replace(message, **changes)


def test_a_batch_becomes_one_task_for_the_worker() -> None:
    request = admit_batch(submit([1, 2, 3, 49], [3, 1]), SPEC, CONTRACT, RING)
    task = request.task(Grant(2, 5, request.batch_id, b"holder", 7, SPEC))
    assert isinstance(task, FillSlot)
    assert (task.slot, task.generation, task.spec, task.layout) == (2, 5, SPEC, request.layout)
    assert np.frombuffer(task.tokens, "<i4").tolist() == [1, 2, 3, 49]
    with pytest.raises(AssertionError):
        request.task(Grant(3, 1, request.batch_id, b"holder", 7, SPEC))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (submit([1, 2], batch_id=b"x" * 16), "is not that of its content"),
        (submit([1, 2], [1]), "1 lengths do not cover 2 tokens"),
        (submit([1, 2], [3, -1]), "do not cover 2 tokens with positive parts"),
        (submit([1, 2], tokens=b"12345"), "tokens has 5 bytes, expected a multiple of 4"),
    ],
)
def test_a_forged_or_malformed_one_breaks_the_protocol(message: wire.Submit, said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        admit_batch(message, SPEC, CONTRACT, RING)


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ([1, 50], "token id 50 is outside the target's vocabulary of 50: tokenise the data"),
        ([-1, 3], "token id -1 is outside"),
        ([1] * 600, r"600 tokens need \d+ bytes and a slot has \d+ .*larger ring\.slot_tokens.*data\.batch_tokens"),
    ],
)
def test_one_that_can_never_be_served_is_told_why(tokens: list[int], said: str) -> None:
    with pytest.raises(Unfit, match=said):
        admit_batch(submit(tokens), SPEC, CONTRACT, RING)


def test_slots_that_are_sized_for_a_narrower_capture_are_said_to_be() -> None:
    wide = CaptureSpec(taps=(0, 1, 2, 3, 4), dtype="float32")
    with pytest.raises(
        Unfit, match=r"64 tokens need .* with a wider capture\.num_taps, .* or capture\.dtype, or train"
    ):
        admit_batch(submit([1] * 64), wide, CONTRACT, RING)


def test_what_is_captured_is_what_is_held_and_its_own_is_cut_out_of_it() -> None:
    held = CaptureSpec(taps=(1, 2, 3), dtype="float32")
    request = admit_batch(submit([1, 2, 3], place=9), SPEC, CONTRACT, RING, shared=True)
    assert (request.want, request.place) == (SPEC, 9)
    ref = request.ref(Lease(1, b"holder", 7, 2, 5, request.batch_id, held))
    assert ref.nbytes == request.layout.nbytes
    assert ref.pieces == cut(held, SPEC, 8, 3)
    task = request.task(Grant(2, 5, request.batch_id, b"holder", 7, held))
    assert isinstance(task, FillSlot)
    assert (task.spec, task.layout) == (held, slot_layout(held, 8, 3))


def test_a_longer_batch_than_the_slots_are_sized_for_cannot_be_shared() -> None:
    room = msgspec.structs.replace(RING, slot_tokens=2)
    with pytest.raises(
        Unfit, match=r"3 tokens in a share, .* up to 2: start the daemon with a larger ring.slot_tokens"
    ):
        admit_batch(submit([1, 2, 3]), SPEC, CONTRACT, room, shared=True)
    assert admit_batch(submit([1, 2, 3]), SPEC, CONTRACT, room).want == SPEC


def test_a_share_that_no_slot_can_hold_is_refused() -> None:
    hello = wire.Hello(name="t", host="h", pid=1, transports=("shm",), spec=SPEC, credits=1, share="s")
    wide = CaptureSpec(taps=(0, 2), final=True, dtype="float32")
    assert check_hello(hello, CONTRACT, RING, [SPEC]) is None
    assert check_hello(hello, CONTRACT, RING, [wide]) == (
        "share s would capture 4 taps + final = 160 bytes a token; slots hold 64: specd start --set capture.num_taps=4 "
        "--set capture.final=true --set capture.dtype=float32"
    )
    other = check_hello(hello, CONTRACT, RING, [CaptureSpec(taps=(1,))])
    assert other == "share s captures bfloat16, this trainer wants float32: give it another share, or none"


def test_a_share_takes_only_transports_that_cut() -> None:
    started = Started(
        contract=CONTRACT, ring=RING, transports=("shm", "nixl"), cutting=("shm",), segment="", load_s=1.0
    )
    assert check_attach("shm", "s", started) is None
    assert check_attach("nixl", "", started) is None
    assert str(check_attach("nixl", "s", started)).endswith("(shm can); leave out --share")
    assert check_attach("nccl", "", started) == "the daemon does not serve it (it serves shm, nixl)"


def test_no_two_probes_share_content() -> None:
    probe = wire.Probe(seq=1, nonce=b"n" * 16, nbytes=100)
    one, other = admit_probe(probe, b"one", RING), admit_probe(probe, b"other", RING)
    assert one.batch_id != other.batch_id
    task = one.task(Grant(0, 1, one.batch_id, b"one", 1, SPEC))
    assert isinstance(task, FillNoise)
    with pytest.raises(ProtocolError, match="does not fit a slot"):
        admit_probe(msgspec.structs.replace(probe, nbytes=RING.slot_bytes + 1), b"one", RING)


def test_a_trainer_of_another_target_or_for_layers_it_lacks_is_refused() -> None:
    hello = wire.Hello(name="t", host="h", pid=0, transports=("shm",), spec=SPEC, credits=1)
    assert check_hello(hello, CONTRACT, RING) is None
    assert check_hello(msgspec.structs.replace(hello, fingerprint=CONTRACT.fingerprint), CONTRACT, RING) is None
    other = check_hello(msgspec.structs.replace(hello, fingerprint="other"), CONTRACT, RING)
    assert other is not None
    assert CONTRACT.fingerprint in other
    assert "(other)" in other
    deep = check_hello(msgspec.structs.replace(hello, spec=CaptureSpec(taps=(5,))), CONTRACT, RING)
    assert deep is not None
    assert "leave the legal range 0…4" in deep


def test_an_exact_target_gives_no_rounded_states() -> None:
    hello = wire.Hello(name="t", host="h", pid=0, transports=("shm",), spec=CaptureSpec(taps=(1,)), credits=1)
    rounded = msgspec.structs.replace(hello, spec=CaptureSpec(taps=(1,), dtype="float8_e4m3fn"))
    assert check_hello(hello, CONTRACT, RING, exact=True) is None
    assert check_hello(rounded, CONTRACT, RING) is None
    assert "leave out capture.dtype=float8_e4m3fn, or start the daemon without --exact" in str(
        check_hello(rounded, CONTRACT, RING, exact=True)
    )


@pytest.mark.parametrize(
    ("taken", "room", "said"),
    [
        ((), 0, "bring grid, pixels for the target, as of images, and tiny takes text alone .*--backend transformers"),
        (("grid",), 64, "tiny takes grid, not pixels"),
        (("grid", "pixels"), 0, "is set to take text alone: start it with --set ring.payload_mib=64"),
        (("grid", "more", "pixels"), 64, ""),
    ],
)
def test_a_trainer_with_images_is_told_at_hello_where_they_are_not_taken(
    taken: tuple[str, ...], room: int, said: str
) -> None:
    hello = wire.Hello(
        name="t", host="h", pid=0, transports=("shm",), spec=SPEC, credits=1, payloads=("grid", "pixels")
    )
    contract = msgspec.structs.replace(CONTRACT, payloads=taken)
    reason = check_hello(hello, contract, msgspec.structs.replace(RING, payload_bytes=room))
    assert re.search(said, reason or "") if said else reason is None


ARRAY = Array(dtype="uint8", shape=(3,), data=memoryview(b"abc"))
IMAGE = pack({"pixels": ARRAY})


def with_images(*payloads: bytes, room: int = 1000) -> tuple[wire.Submit, RingInfo]:
    """A SUBMIT of two sequences that bring payloads, with its id, and the ring."""
    message = submit([1, 2, 3], [1, 2], payloads=payloads)
    ids, sizes = np.array([1, 2, 3], "<i4"), np.array([1, 2], "<i4")
    identity = batch_id(CONTRACT.fingerprint, ids, sizes, payloads)
    return msgspec.structs.replace(message, batch_id=identity), msgspec.structs.replace(RING, payload_bytes=room)


def test_payloads_reach_the_worker_and_make_another_batch() -> None:
    message, ring = with_images(b"", IMAGE)
    request = admit_batch(message, SPEC, CONTRACT, ring)
    task = request.task(Grant(2, 5, request.batch_id, b"holder", 7, SPEC))
    assert isinstance(task, FillSlot)
    assert task.payloads == (b"", IMAGE)
    assert request.batch_id != admit_batch(submit([1, 2, 3], [1, 2]), SPEC, CONTRACT, ring).batch_id
    with pytest.raises(ProtocolError, match="is not that of its content"):
        admit_batch(msgspec.structs.replace(message, payloads=(IMAGE, b"")), SPEC, CONTRACT, ring)


@pytest.mark.parametrize(
    ("payloads", "said"),
    [
        ((IMAGE,), "1 payloads, 1 of them not empty, for 2 sequences"),
        ((b"", b""), "2 payloads, 0 of them not empty"),
        ((b"", IMAGE[:-1]), "not a payload"),
    ],
)
def test_malformed_payloads_break_the_protocol(payloads: tuple[bytes, ...], said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        admit_batch(with_images(*payloads)[0], SPEC, CONTRACT, with_images()[1])


def test_more_payloads_than_the_daemon_takes_are_named() -> None:
    message, ring = with_images(IMAGE, IMAGE, room=2 * len(IMAGE) - 1)
    with pytest.raises(Unfit, match=r"of 2 sequences have \d+ bytes, and the daemon takes \d+ .*ring\.payload_mib"):
        admit_batch(message, SPEC, CONTRACT, ring)


@pytest.mark.parametrize(
    ("name", "offset", "length", "pending", "said"),
    [
        ("embedding", 0, 9, MAX_FETCHES, "artifact reads"),
        ("lm_head", 0, 9, 0, "has no artifact 'lm_head'"),
        ("embedding", 2 * ARTIFACT_CHUNK_BYTES - 1, 2, 0, "cannot be fetched"),
    ],
)
def test_reads_of_artifacts_are_bounded(name: str, offset: int, length: int, pending: int, said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        check_fetch(wire.Fetch(name=name, offset=offset, length=length), CONTRACT, pending)
    check_fetch(wire.Fetch(name="embedding", offset=5, length=ARTIFACT_CHUNK_BYTES), CONTRACT, MAX_FETCHES - 1)
