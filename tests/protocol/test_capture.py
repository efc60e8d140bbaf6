"""Specs of what is captured: bytes per token, and why one cannot be captured."""

from __future__ import annotations

import msgspec
import pytest

from specd.protocol.capture import CaptureSpec, plain


def test_bytes_per_token_of_the_design() -> None:
    dflash = CaptureSpec(taps=(1, 12, 23, 34, 45))
    eagle = CaptureSpec(taps=(1, 23, 44), final=True)
    assert dflash.bytes_per_token(2048) == 20_480
    assert eagle.bytes_per_token(2048) == 16_384
    assert CaptureSpec(taps=(), final=True, dtype="float32").bytes_per_token(576) == 2_304
    assert CaptureSpec(taps=(1,), dtype="float16").bytes_per_token(576) == 1_152
    assert CaptureSpec(taps=(1, 2), final=True, dtype="float8_e4m3fn").bytes_per_token(2048) == 3 * (2048 + 4)


@pytest.mark.parametrize(
    ("taps", "final", "problem"),
    [
        ((0, 46), False, None),
        ((), True, None),
        ((), False, "captures nothing"),
        ((3, 3), False, "not strictly ascending"),
        ((5, 3), True, "not strictly ascending"),
        ((1, 47), False, "for the state after the last layer ask for `final`"),
        ((-1, 3), False, "legal range 0…46"),
        ((2**64,), False, "legal range 0…46"),
    ],
)
def test_problem_says_why_a_spec_cannot_be_captured(taps: tuple[int, ...], final: bool, problem: str | None) -> None:
    found = CaptureSpec(taps=taps, final=final).problem(48)
    if problem is None:
        assert found is None
    else:
        assert found is not None
        assert problem in found


def test_states_are_read_in_a_dtype_that_can_be_computed_in() -> None:
    assert [plain(dtype) for dtype in ("float32", "float16", "float8_e4m3fn", "int8")] == [
        "float32", "float16", "bfloat16", "bfloat16",
    ]  # fmt: skip


def test_the_dtype_is_one_of_four() -> None:
    with pytest.raises(msgspec.ValidationError, match="int8"):
        msgspec.convert({"taps": [1], "dtype": "int8"}, CaptureSpec)
