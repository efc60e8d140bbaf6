"""Pages of a store: read back as written, or damage."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from specd.errors import ConfigError
from specd.protocol.capture import FP8
from specd.replay import form
from specd.replay.form import PAGE, DamageError, Header, Identity, Super

IDENTITY = Identity(model="tiny", fingerprint="a:b", backend="x 1", torch="2.9", device="cpu", exact=True, tp=2)
HEADER = Header(bytes(range(32)), 5000, 7, 1 << 63)


def test_pages_read_back_as_written() -> None:
    page = form.pack_super(Super(IDENTITY, 7936, 63 << 20))
    assert len(page) == PAGE
    assert form.parse_super(page) == Super(IDENTITY, 7936, 63 << 20)
    assert form.parse_super(bytes(PAGE)) is None
    page = form.pack_header(5, HEADER)
    assert len(page) == PAGE
    assert form.parse_header(page, 5) == HEADER
    assert form.parse_header(bytes(PAGE), 5) is None


def test_every_flipped_bit_of_a_page_is_damage() -> None:
    one, header = form.pack_super(Super(IDENTITY, 1, PAGE)), form.pack_header(5, HEADER)
    for at in range(PAGE):
        flipped = bytearray(one)
        flipped[at] ^= 1 << at % 8
        with pytest.raises(DamageError):
            form.parse_super(bytes(flipped))
        flipped = bytearray(header)
        flipped[at] ^= 1 << at % 8
        with pytest.raises(DamageError, match="cell 5"):
            form.parse_header(bytes(flipped), 5)
    with pytest.raises(DamageError, match="cell 6"):
        form.parse_header(header, 6)


def test_what_an_identity_tells_apart() -> None:
    assert IDENTITY.unlike(replace(IDENTITY, model="renamed")) == []
    for name in IDENTITY.__struct_fields__:
        if name != "model":
            assert IDENTITY.unlike(replace(IDENTITY, **{name: "another"})) == [name]
    assert str(IDENTITY) == "tiny on x 1, exact, tp 2, cpu, torch 2.9"
    assert str(replace(IDENTITY, encoding=FP8)) == f"{IDENTITY}, kept as float8_e4m3fn"
    with pytest.raises(ConfigError, match="at most"):
        form.pack_super(Super(replace(IDENTITY, fingerprint="f" * PAGE), 1, PAGE))


def test_cells_lie_one_behind_another() -> None:
    assert [form.offset(cell, 2 * PAGE) for cell in range(3)] == [PAGE, 4 * PAGE, 7 * PAGE]
    assert [form.whole_pages(size) for size in (0, 1, PAGE, PAGE + 1)] == [0, PAGE, PAGE, 2 * PAGE]
    assert form.digest_of(b"key", memoryview(b"image")) != form.digest_of(b"kez", memoryview(b"image"))
