"""The wire: golden bytes and round trips of every message, and the text that describes them.

`python tests/protocol/test_messages.py` writes the golden bytes anew; do that only together with a new VERSION.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from messages import BY_TAG, CONTRACT, EPOCH, SAMPLES, TYPES, decode
from specd.protocol import limits
from specd.protocol import messages as wire
from specd.protocol.batch import Layout, TensorRef
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import ArtifactRef, ReplayInfo, RingInfo, TargetContract

GOLDEN = Path(__file__).parents[1] / "golden" / "protocol.json"
TEXT = Path(__file__).parents[2] / "docs" / "protocol.md"


def atoms(data: bytes) -> Iterator[str]:
    """A msgpack value as one line per item, `hex  meaning`: a reader of our own that makes the golden file readable."""
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        at += count
        assert at <= len(data), "truncated"
        return data[at - count : at]

    todo = 1
    while todo:
        todo -= 1
        begin, code = at, take(1)[0]
        if code < 0x80 or code >= 0xE0:
            meaning = str(code if code < 0x80 else code - 256)
        elif code < 0x90 or code in (0xDE, 0xDF):
            count = code & 15 if code < 0x90 else int.from_bytes(take(2 if code == 0xDE else 4), "big")
            todo, meaning = todo + 2 * count, f"map of {count}"
        elif code < 0xA0 or code in (0xDC, 0xDD):
            count = code & 15 if code < 0xA0 else int.from_bytes(take(2 if code == 0xDC else 4), "big")
            todo, meaning = todo + count, f"array of {count}"
        elif code < 0xC0 or 0xD9 <= code <= 0xDB:
            count = code & 31 if code < 0xC0 else int.from_bytes(take(1 << (code - 0xD9)), "big")
            meaning = json.dumps(take(count).decode())
        elif 0xC4 <= code <= 0xC6:
            count = int.from_bytes(take(1 << (code - 0xC4)), "big")
            take(count)
            meaning = f"{count} bytes"
        elif 0xCC <= code <= 0xCF:
            meaning = str(int.from_bytes(take(1 << (code - 0xCC)), "big"))
        elif code == 0xCB:
            meaning = str(struct.unpack(">d", take(8))[0])
        else:
            meaning = {0xC0: "nil", 0xC2: "false", 0xC3: "true"}[code]
        yield f"{data[begin:at].hex()}  {meaning}"
    assert at == len(data), "trailing bytes"


def golden_of(message: wire.Message) -> list[str]:
    frame = wire.encode(message)
    return [f"{frame[:1].hex()}  version", *atoms(frame[1:])]


def frame_of(lines: list[str]) -> bytes:
    return bytes.fromhex("".join(line.split()[0] for line in lines))


def test_there_is_a_sample_of_every_message() -> None:
    assert len(SAMPLES) == len(BY_TAG) == len(TYPES)
    assert {type(message) for message in SAMPLES} == set(TYPES)
    assert not set(get_args(wire.ToDaemon)) & set(get_args(wire.ToTrainer))


@pytest.mark.parametrize("tag", BY_TAG)
def test_golden_bytes(tag: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["version"] == wire.VERSION, "write the golden file anew for a new VERSION"
    assert set(golden["messages"]) == set(BY_TAG)
    lines = golden["messages"][tag]
    assert golden_of(BY_TAG[tag]) == lines, "the wire format changed: raise VERSION, then write the golden file anew"
    assert decode(frame_of(lines)) == BY_TAG[tag]


def test_a_golden_frame_by_hand() -> None:
    frame = (
        b"\x05" + b"\x83" + b"\xa4type" + b"\xa7release" + b"\xa5epoch" + b"\xc4\x10" + EPOCH + b"\xa5lease" + b"\x07"
    )
    assert wire.encode(wire.Release(epoch=EPOCH, lease=7)) == frame


# Round trips

u64 = st.integers(0, 2**64 - 1)
int31 = st.integers(0, 2**31 - 1)
positive = st.integers(1, 2**31 - 1)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
name = text.filter(bool)
names = st.lists(name, max_size=4).map(tuple)
epochs = st.just(b"") | st.binary(min_size=16, max_size=16)
batch_ids = st.binary(min_size=16, max_size=16)
data = st.binary(min_size=4, max_size=64)
payloads = st.lists(st.binary(max_size=32), max_size=3).map(tuple)
specs = st.builds(
    CaptureSpec,
    taps=st.lists(st.integers(), max_size=5).map(lambda taps: tuple(tap % 2**32 for tap in taps)),
    final=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
shapes = st.lists(u64, max_size=4).map(tuple)
tensors = st.builds(TensorRef, name=text, offset=u64, shape=shapes, dtype=text)
layouts = st.builds(Layout, tensors=st.lists(tensors, max_size=2).map(tuple), nbytes=u64)
artifacts = st.builds(ArtifactRef, nbytes=u64, shape=shapes, dtype=text, same_as=text)
factors = st.floats(1e-6, 1e6)
contracts = st.builds(
    TargetContract, model=text, model_type=text, hidden_size=positive, num_layers=positive, vocab_size=positive,
    dtype=text, weights=text, tokenizer=text, chat_template=text, taps=text, revision=text,
    artifacts=st.dictionaries(name, artifacts, max_size=3), embedding_scale=factors, logit_scale=factors,
    logit_softcap=factors | st.just(0.0), odd_embedding=text, odd_logits=text, payloads=names,
)  # fmt: skip
rings = st.builds(
    RingInfo, num_slots=positive, slot_bytes=st.integers(1, 2**64 - 1), slot_tokens=positive,
    payload_bytes=st.integers(0, limits.MAX_PAYLOAD_BYTES),
)  # fmt: skip
replays = st.none() | st.builds(ReplayInfo, cells=u64, used=u64, cell_bytes=u64, failed=text)
finite = st.floats(allow_nan=False)
sessions = st.builds(
    wire.SessionStatus, session=text, name=text, transport=text, gpus=names, credits=u64, outstanding=u64, leases=u64,
    batches=u64, nbytes=u64, age_s=finite, run=text, ranks=u64, share=text, behind=st.booleans(),
)  # fmt: skip
counts = st.dictionaries(text, u64, max_size=3)
FIELDS: dict[type[wire.Message], dict[str, st.SearchStrategy[Any]]] = {
    wire.Hello: {
        "name": name, "host": text, "pid": int31, "gpus": names, "transports": names, "spec": specs,
        "credits": positive, "fingerprint": text, "payloads": names, "run": batch_ids, "ranks": positive,
        "share": text, "epoch_batches": u64,
    },
    wire.Attach: {"transport": name, "hello": st.binary(max_size=64)},
    wire.Probe: {"seq": u64, "nonce": st.binary(min_size=8, max_size=64), "nbytes": st.integers(1, 2**64 - 1)},
    wire.Submit: {
        "seq": u64, "batch_id": batch_ids, "tokens": data, "lengths": data, "payloads": payloads, "place": u64,
        "keep": st.booleans(),
    },
    wire.RecvReady: {"lease": u64},
    wire.Borrow: {"lease": u64},
    wire.Release: {"lease": u64},
    wire.Renew: {"epoch_batches": u64},
    wire.Fetch: {"name": name, "offset": u64, "length": st.integers(1, limits.ARTIFACT_CHUNK_BYTES)},
    wire.Status: {},
    wire.Bye: {},
    wire.Welcome: {
        "contract": contracts, "ring": rings, "credits": positive, "slots": positive, "lease_ttl_ms": positive,
        "transports": names, "sharing": int31, "replay": replays,
    },
    wire.Reject: {"reason": text, "retry_ms": int31, "loading_ms": int31},
    wire.Offer: {"transport": name, "offer": st.binary(max_size=64)},
    wire.Refuse: {"transport": name, "reason": text},
    wire.Ready: {
        "seq": u64, "batch_id": batch_ids, "lease": u64, "slot": int31, "generation": st.integers(1, 2**64 - 1),
        "layout": layouts, "busy_slots": int31, "target_us": u64,
        "held": st.none() | specs, "source": st.sampled_from(["forward", "joined", "kept", "replay"]),
    },
    wire.Failed: {"seq": u64, "batch_id": batch_ids, "reason": text, "retry": st.booleans()},
    wire.Revoke: {"reason": text},
    wire.Renewed: {},
    wire.Artifact: {"name": name, "offset": u64, "data": st.binary(max_size=64)},
    wire.StatusReport: {
        "state": text, "version": text, "pid": u64, "worker_pid": u64, "uptime_s": finite,
        "contract": st.none() | contracts, "ring": st.none() | rings, "slots": counts, "queued": u64,
        "sessions": st.lists(sessions, max_size=2).map(tuple), "counters": counts, "endpoints": names,
        "transports": names, "loading_ms": int31, "max_sessions": int31, "replay": replays,
        "lag_cells": int31, "lag_used": int31,
    },
    wire.Error: {"reason": text},
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_round_trip(kind: type[wire.Message]) -> None:
    assert {"epoch", *FIELDS[kind]} == set(kind.__struct_fields__)

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(st.builds(kind, epoch=epochs, **FIELDS[kind]))
    def check(message: wire.Message) -> None:
        frame = wire.encode(message)
        assert decode(frame) == message
        assert decode(memoryview(frame)) == message
        assert wire.encode(decode(frame)) == frame

    check()


# The text


def test_the_text_lists_every_message_with_its_fields() -> None:
    sections = dict(re.findall(r"^#### `(\w+)`\n(.*?)(?=^##|\Z)", TEXT.read_text(), re.MULTILINE | re.DOTALL))
    assert set(sections) == set(BY_TAG)
    for tag, message in BY_TAG.items():
        rows = re.findall(r"^\| (`.+?) \|", sections[tag], re.MULTILINE)
        listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
        assert listed == [field for field in type(message).__struct_fields__ if field != "epoch"], tag


def test_the_text_has_the_limits_of_the_code() -> None:
    text = TEXT.read_text()
    assert f"version {wire.VERSION}\n" in text.splitlines(keepends=True)[0]
    for limit in (
        limits.MAX_MESSAGE_BYTES, limits.MAX_REQUEST_BYTES, limits.ARTIFACT_CHUNK_BYTES, limits.MAX_OFFER_BYTES,
        limits.MAX_HELLO_BYTES, limits.MAX_TAPS, limits.MAX_REASON_CHARS, limits.MAX_PAYLOAD_BYTES,
    ):  # fmt: skip
        assert f"{limit:,}" in text


# The contract


def test_the_fingerprint_tells_targets_apart_and_ignores_what_they_are_called() -> None:
    same = msgspec.structs.replace(CONTRACT, model="/models/smollm2", artifacts={})
    assert same.fingerprint == CONTRACT.fingerprint
    for field, value in {
        "model_type": "qwen3", "hidden_size": 577, "num_layers": 31, "vocab_size": 49153, "dtype": "bfloat16",
        "weights": "ff", "tokenizer": "ff", "chat_template": "ff",
    }.items():  # fmt: skip
        other = msgspec.structs.replace(CONTRACT, **{field: value})
        assert other.fingerprint != CONTRACT.fingerprint, field


def write_golden() -> None:
    messages = {tag: golden_of(message) for tag, message in BY_TAG.items()}
    GOLDEN.write_text(json.dumps({"version": wire.VERSION, "messages": messages}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write_golden()
