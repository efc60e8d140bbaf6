"""Payloads: bytes that are the same for the same arrays, and everything else refused with what is wrong."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from specd.errors import ProtocolError
from specd.protocol.limits import MAX_ARRAYS
from specd.protocol.payload import Array, digests, pack, total_bytes, unpack

PIXELS = Array(dtype="float32", shape=(2, 3), data=memoryview(bytes(range(24))))
GRID = Array(dtype="int64", shape=(0, 3), data=memoryview(b""))


def test_a_payload_comes_back_as_views_whatever_the_order_of_its_names() -> None:
    packed = pack({"pixel_values": PIXELS, "image_grid_thw": GRID})
    assert pack({"image_grid_thw": GRID, "pixel_values": PIXELS}) == packed
    found = unpack(packed)
    assert found == {"pixel_values": PIXELS, "image_grid_thw": GRID}
    assert found["pixel_values"].data.obj is packed, "not copied"
    assert pack({}) == b""
    assert unpack(b"") == {}


def form(**changes: Any) -> dict[str, Any]:
    return {"dtype": "float32", "shape": [2, 3], "data": bytes(24)} | changes


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": form(data=bytes(23))}, r"23 bytes of float32 \[2, 3\]: expected 24"),
        ({"a": form(shape=[2**20, 2**20])}, "24 bytes of float32"),
        ({"a": form(shape=[0, 2**63], data=b"")}, r"<= 268435456"),
        ({"a": form(shape=[-2, -3])}, r"shape\[\.\.\.\]|>= 0"),
        ({"a": form(shape=[1] * 9)}, "length <= 8"),
        ({"a": form(dtype="object")}, "Invalid enum value 'object'"),
        ({"a": form(pickle=b"")}, "unknown field `pickle`"),
        ({"": form()}, "length >= 1"),
        ({}, "length >= 1"),
        ({f"a{i}": form() for i in range(MAX_ARRAYS + 1)}, f"length <= {MAX_ARRAYS}"),
        ([form()], "Expected `object`"),
    ],
)
def test_what_is_none_is_refused(value: Any, said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        unpack(msgspec.msgpack.encode(value))


def test_every_cut_is_refused() -> None:
    packed = pack({"pixel_values": PIXELS})
    for end in range(1, len(packed)):
        with pytest.raises(ProtocolError, match="not a payload"):
            unpack(packed[:end])
    with pytest.raises(ProtocolError, match="trailing"):
        unpack(packed + b"\x00")


def test_payloads_are_told_apart_by_content_and_place() -> None:
    one, other = pack({"a": PIXELS}), pack({"b": PIXELS})
    assert total_bytes((one, b"", other)) == len(one) + len(other)
    ways = [digests(each) for each in ((one, b""), (b"", one), (other, b""), (one, other), (one,))]
    assert [len(way) for way in ways] == [32, 32, 32, 32, 16]
    assert len(set(ways)) == len(ways)
    assert digests(()) == b""
