"""The wire refuses everything that is not a message, with a ProtocolError that says why."""

from __future__ import annotations

import random
import time
from typing import Any, get_args

import msgspec
import pytest

from messages import BATCH, BY_TAG, EPOCH, SAMPLES, decode
from specd.errors import ProtocolError
from specd.protocol import limits
from specd.protocol import messages as wire

VERSION = bytes((wire.VERSION,))


def pack(fields: dict[str, Any]) -> bytes:
    return VERSION + msgspec.msgpack.encode(fields)


def unpack(message: wire.Message) -> dict[str, Any]:
    fields = msgspec.msgpack.decode(wire.encode(message)[1:])
    assert isinstance(fields, dict)
    return fields


def refused(frame: bytes) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode(frame)
    return str(caught.value)


def test_an_empty_frame_is_refused() -> None:
    assert "empty frame" in refused(b"")


@pytest.mark.parametrize("version", [0, 1, 0x83, 255])
def test_another_version_is_refused_whatever_follows(version: int) -> None:
    frame = wire.encode(wire.Renew(epoch=EPOCH))
    assert f"version {version} is not {wire.VERSION}" in refused(bytes((version,)) + frame[1:])
    assert f"version {version} is not {wire.VERSION}" in refused(bytes((version,)))


@pytest.mark.parametrize("tag", BY_TAG)
def test_truncated_and_trailing_bytes_are_refused(tag: str) -> None:
    frame = wire.encode(BY_TAG[tag])
    for end in range(len(frame)):
        refused(frame[:end])
    assert "trailing" in refused(frame + b"\x00")
    assert "trailing" in refused(frame + frame)


@pytest.mark.parametrize("tag", BY_TAG)
def test_unknown_missing_and_mistyped_fields_are_refused_by_name(tag: str) -> None:
    fields = unpack(BY_TAG[tag])
    assert "unknown field `slots_`" in refused(pack({**fields, "slots_": 1}))
    required = {field.name for field in msgspec.structs.fields(type(BY_TAG[tag])) if field.required}
    for key in fields.keys() - {"type"}:
        if key in required:
            assert f"missing required field `{key}`" in refused(pack({k: v for k, v in fields.items() if k != key}))
        assert f"$.{key}" in refused(pack({**fields, key: {"no": "such"}}))
        wrong = "text" if isinstance(fields[key], bytes) else b"bytes"
        assert f"$.{key}" in refused(pack({**fields, key: wrong}))
        if isinstance(fields[key], int):
            for value in (float(fields[key]), str(int(fields[key])), None):
                assert f"$.{key}" in refused(pack({**fields, key: value}))


@pytest.mark.parametrize(
    "value",
    [None, True, 0, "release", b"release", [], ["release", 7], {}, {"type": "nope"}, {"type": 1}, {"type": None}, 1.5],
)
def test_what_is_no_tagged_map_is_refused(value: Any) -> None:
    refused(VERSION + msgspec.msgpack.encode(value))


def test_unknown_fields_inside_nested_structs_are_refused() -> None:
    hello = unpack(BY_TAG["hello"])
    assert "unknown field `head` - at `$.spec`" in refused(pack({**hello, "spec": {**hello["spec"], "head": 1}}))
    welcome = unpack(BY_TAG["welcome"])
    assert "unknown field `slot` - at `$.ring`" in refused(pack({**welcome, "ring": {**welcome["ring"], "slot": 1}}))
    ready = unpack(BY_TAG["ready"])
    tensor = {**ready["layout"]["tensors"][0], "strides": []}
    assert "strides" in refused(pack({**ready, "layout": {**ready["layout"], "tensors": [tensor]}}))


LONG = 201 * "x"
TENSOR = {"name": "taps", "offset": 0, "shape": [1], "dtype": "float32"}
BOUNDS: list[tuple[str, str, Any]] = [
    *((tag, "epoch", value) for tag in BY_TAG for value in (b"\0", bytes(15), bytes(17), bytes(32))),
    *(("hello", "name", value) for value in ("", LONG)),
    ("hello", "host", LONG),
    *(("hello", "pid", value) for value in (-1, 2**31, 2**63, 2**64 - 1)),
    *(("hello", "gpus", value) for value in ([""], [LONG], ["g"] * 65)),
    *(("hello", "transports", value) for value in ([""], [LONG], ["t"] * 33, [1])),
    *(("hello", "credits", value) for value in (-1, 0, 2**31, 2**64 - 1)),
    ("hello", "fingerprint", 1001 * "x"),
    *(("hello", "run", value) for value in (b"", bytes(15), bytes(17))),  # none: the sample has 2 ranks
    *(("hello", "ranks", value) for value in (-1, 0, 2**31)),
    ("hello", "spec", {"taps": [1] * 1025}),
    ("hello", "spec", {"taps": [1.5]}),
    ("hello", "spec", {"taps": [1], "dtype": "int8"}),
    ("hello", "spec", {"taps": [1], "final": 1}),
    *(("attach", "transport", value) for value in ("", LONG)),
    ("attach", "hello", bytes(4097)),
    *(("probe", "nonce", value) for value in (b"", bytes(7), bytes(65))),
    *(("probe", "nbytes", value) for value in (-1, 0)),
    *((tag, "seq", -1) for tag in ("probe", "submit", "ready", "failed")),
    *((tag, "batch_id", value) for tag in ("submit", "ready", "failed") for value in (b"", bytes(15), bytes(17))),
    *(("submit", field, value) for field in ("tokens", "lengths") for value in (b"", b"\0\0\0")),
    *((tag, "lease", value) for tag in ("recv_ready", "borrow", "release", "ready") for value in (-1, -(2**63))),
    *(("fetch", "name", value) for value in ("", LONG)),
    ("fetch", "offset", -1),
    *(("fetch", "length", value) for value in (-1, 0, limits.ARTIFACT_CHUNK_BYTES + 1, 2**64 - 1)),
    *(("welcome", field, value) for field in ("credits", "slots", "lease_ttl_ms") for value in (-1, 0, 2**31)),
    *(("reject", field, value) for field in ("retry_ms", "loading_ms") for value in (-1, 2**31)),
    ("ready", "layout", {"tensors": [TENSOR] * 17, "nbytes": 1}),
    ("ready", "layout", {"tensors": [{**TENSOR, "shape": [1] * 9}], "nbytes": 1}),
    *((tag, "reason", 2001 * "x") for tag in ("reject", "refuse", "failed", "revoke", "error")),
    ("offer", "offer", bytes((64 << 10) + 1)),
    *(("ready", "slot", value) for value in (-1, 2**31)),
    *(("ready", "generation", value) for value in (-1, 0)),
    ("artifact", "data", bytes(limits.ARTIFACT_CHUNK_BYTES + 1)),
]


@pytest.mark.parametrize(("tag", "field", "value"), BOUNDS)
def test_values_out_of_bounds_are_refused(tag: str, field: str, value: Any) -> None:
    fields = unpack(BY_TAG[tag])
    assert field in fields or field == "epoch"  # a default is not sent
    refused(pack({**fields, field: value}))


def test_the_largest_values_are_taken() -> None:
    release = decode(pack({"type": "release", "lease": 2**64 - 1}))
    assert isinstance(release, wire.Release)
    assert release.lease == 2**64 - 1
    fields = unpack(BY_TAG["hello"])
    hello = decode(pack({**fields, "name": 200 * "ü", "pid": 2**31 - 1, "spec": {"taps": list(range(1024))}}))
    assert isinstance(hello, wire.Hello)
    assert (len(hello.name), hello.pid, len(hello.spec.taps)) == (200, 2**31 - 1, 1024)


def test_each_side_takes_only_what_is_for_it() -> None:
    for message in SAMPLES:
        other = wire.decode_reply if isinstance(message, get_args(wire.ToDaemon)) else wire.decode_request
        with pytest.raises(ProtocolError, match=r"at `\$\.type`"):
            other(wire.encode(message))


def test_a_length_out_of_bounds_is_refused_before_its_items_are_read() -> None:
    taps = msgspec.msgpack.encode(list(range(8_000_000)))
    head = wire.encode(wire.Renew())[:1] + b"\x82\xa4type\xa5hello\xa4spec\x81\xa4taps"
    began = time.thread_time()
    refused(head + taps)
    assert time.thread_time() - began < 0.05  # 200 ms to read them


def test_text_that_is_not_utf8_is_refused() -> None:
    frame = wire.encode(BY_TAG["hello"])
    assert frame.count(b"trainer") == 1
    assert "utf-8" in refused(frame.replace(b"trainer", b"\xff\xfe\xfd\xfc\x80\x80\x80")).lower()
    refused(frame.replace(b"\xa4type", b"\xa4\xff\xff\xff\xff"))
    assert "utf-8" in refused(frame.replace(b"\xa5hello", b"\xa5\xff\xff\xff\xff\xff")).lower()


@pytest.mark.parametrize("opener", [b"\x91", b"\x81\xa1a", b"\xdd\x00\x00\x00\x01", b"\x81\x91"])
def test_deep_nesting_is_refused(opener: bytes) -> None:
    for depth in (200, 5_000, 100_000):
        refused(VERSION + opener * depth)
        refused(VERSION + b"\x82\xa1x" + opener * depth + b"\x00\xa4type\xa5renew")
        refused(VERSION + b"\x82\xa4type\xa5renew\xa5epoch" + opener * depth + b"\x00")


@pytest.mark.parametrize(
    "claim", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"]
)
def test_a_length_that_is_only_claimed_is_refused(claim: bytes) -> None:
    refused(VERSION + claim)
    refused(VERSION + b"\x82\xa4type\xa5renew\xa5epoch" + claim)
    refused(VERSION + b"\x82\xa4type\xa5hello\xaatransports" + claim)


def test_a_refusal_does_not_repeat_all_that_was_sent() -> None:
    assert len(refused(pack({"type": 1_000_000 * "x"}))) < 600
    assert len(refused(pack({"type": "renew", 1_000_000 * "x": 1}))) < 600


def test_msgpack_extensions_and_timestamps_are_refused() -> None:
    for value in (b"\xd6\xff\x00\x00\x00\x00", b"\xd4\x05\x00", b"\xc7\x03\x05abc"):
        refused(VERSION + value)
        refused(VERSION + b"\x82\xa4type\xa7release\xa5lease" + value)


def test_a_message_too_large_to_be_taken_is_not_sent() -> None:
    tokens = bytes(limits.MAX_MESSAGE_BYTES)
    message = wire.Submit(epoch=EPOCH, seq=0, batch_id=BATCH, tokens=tokens, lengths=b"\1\0\0\0")
    with pytest.raises(ProtocolError, match="exceeds the limit of 8388608"):
        wire.encode(message)


def test_an_epoch_of_another_length_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="expected 16"):
        wire.Renew(epoch=b"short")


def test_damaged_frames_are_messages_or_protocol_errors() -> None:
    rng = random.Random(7)
    frames = [wire.encode(message) for message in SAMPLES]
    outcomes = {True: 0, False: 0}
    for _ in range(20_000):
        frame = bytearray(rng.choice(frames))
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(1, len(frame))
            match rng.randrange(4):
                case 0:
                    frame[at] = rng.randrange(256)
                case 1:
                    frame[at] ^= 1 << rng.randrange(8)
                case 2:
                    frame[at:at] = rng.randbytes(rng.randrange(1, 6))
                case 3:
                    del frame[at : at + rng.randrange(1, 6)]
            if len(frame) < 2:
                break
        try:
            message = decode(bytes(frame))
        except ProtocolError:
            outcomes[False] += 1
        else:
            assert isinstance(message, wire.Message)
            outcomes[True] += 1
    assert min(outcomes.values()) > 500
