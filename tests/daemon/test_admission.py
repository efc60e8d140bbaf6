"""Admission: what a request must be to get a place in the ring, and what each refusal says."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from specd.daemon.admission import Unfit, admit_batch, admit_probe, check_fetch, check_hello
from specd.daemon.slots import Grant
from specd.errors import ProtocolError
from specd.protocol import messages as wire
from specd.protocol.batch import batch_id, slot_bytes
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import ArtifactRef, RingInfo, TargetContract
from specd.protocol.limits import ARTIFACT_CHUNK_BYTES, MAX_FETCHES
from specd.worker.messages import FillNoise, FillSlot

CONTRACT = TargetContract(
    model="tiny", model_type="llama", hidden_size=8, num_layers=6, vocab_size=50, dtype="float32", weights="w",
    artifacts={"embedding": ArtifactRef(nbytes=2 * ARTIFACT_CHUNK_BYTES)},
)  # fmt: skip
SPEC = CaptureSpec(taps=(1, 3), dtype="float32")
RING = RingInfo(num_slots=4, slot_bytes=slot_bytes(SPEC, 8, 64), slot_tokens=64)


def submit(content: list[int], lengths: list[int] | None = None, **changes: Any) -> wire.Submit:
    ids, sizes = np.array(content, "<i4"), np.array(lengths or [len(content)], "<i4")
    message = wire.Submit(
        seq=7, batch_id=batch_id(CONTRACT.fingerprint, SPEC, ids, sizes), tokens=ids.tobytes(), lengths=sizes.tobytes()
    )
    return msgspec.structs.replace(message, **changes)


def test_a_batch_becomes_one_task_for_the_worker() -> None:
    request = admit_batch(submit([1, 2, 3, 49], [3, 1]), SPEC, CONTRACT, RING)
    task = request.task(Grant(2, 5, request.batch_id, b"holder", 7), SPEC)
    assert isinstance(task, FillSlot)
    assert (task.slot, task.generation, task.spec, task.layout) == (2, 5, SPEC, request.layout)
    assert np.frombuffer(task.tokens, "<i4").tolist() == [1, 2, 3, 49]
    with pytest.raises(AssertionError):
        request.task(Grant(3, 1, request.batch_id, b"holder", 7), SPEC)


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


def test_no_two_probes_share_content() -> None:
    probe = wire.Probe(seq=1, nonce=b"n" * 16, nbytes=100)
    one, other = admit_probe(probe, b"one", RING), admit_probe(probe, b"other", RING)
    assert one.batch_id != other.batch_id
    task = one.task(Grant(0, 1, one.batch_id, b"one", 1), SPEC)
    assert isinstance(task, FillNoise)
    with pytest.raises(ProtocolError, match="does not fit a slot"):
        admit_probe(msgspec.structs.replace(probe, nbytes=RING.slot_bytes + 1), b"one", RING)


def test_a_trainer_of_another_target_or_for_layers_it_lacks_is_refused() -> None:
    hello = wire.Hello(name="t", host="h", pid=0, transports=("shm",), spec=SPEC, credits=1)
    assert check_hello(hello, CONTRACT) is None
    assert check_hello(msgspec.structs.replace(hello, fingerprint=CONTRACT.fingerprint), CONTRACT) is None
    other = check_hello(msgspec.structs.replace(hello, fingerprint="other"), CONTRACT)
    assert other is not None
    assert CONTRACT.fingerprint in other
    assert "(other)" in other
    deep = check_hello(msgspec.structs.replace(hello, spec=CaptureSpec(taps=(5,))), CONTRACT)
    assert deep is not None
    assert "leave the legal range 0…4" in deep


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
