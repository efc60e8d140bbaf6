"""Taps and bytes per token, against the numbers of the published checkpoints."""

from __future__ import annotations

import msgspec
import pytest

from specd.drafts.taps import eagle3_taps, spread_taps
from specd.errors import ConfigError
from specd.protocol.capture import CaptureSpec


@pytest.mark.parametrize(
    ("num_layers", "num_taps", "taps"),
    [
        (48, 1, (24,)),
        (48, 5, (1, 12, 23, 34, 45)),
        (48, 8, (1, 7, 14, 20, 26, 32, 39, 45)),
        (36, 1, (18,)),
        (36, 5, (1, 9, 17, 25, 33)),
        (30, 5, (1, 8, 14, 20, 27)),
        (30, 2, (1, 27)),
        (4, 1, (2,)),
        (6, 3, (1, 2, 3)),
    ],
)
def test_spread_taps(num_layers: int, num_taps: int, taps: tuple[int, ...]) -> None:
    assert spread_taps(num_layers, num_taps) == taps


def test_spread_taps_of_a_hybrid_target_take_the_first_and_last_eligible_layer() -> None:
    eligible = tuple(range(3, 44, 4))  # 3, 7, …, 43
    assert spread_taps(48, 5, eligible) == (3, 11, 23, 35, 43)
    assert spread_taps(48, 2, eligible) == (3, 43)
    assert spread_taps(48, 1, eligible) == (23,)
    assert spread_taps(48, len(eligible), eligible) == eligible


@pytest.mark.parametrize(
    ("num_layers", "num_taps", "eligible"),
    [
        (48, 0, ()),
        (48, -1, ()),
        (48, 46, ()),  # only 44 layers lie between the first and the last
        (4, 2, ()),
        (3, 2, ()),
        (1, 1, ()),
        (48, 3, (3, 7)),  # more taps than layers
        (48, 2, (3, 47)),  # the last layer is no legal tap
        (48, 2, (7, 3)),
    ],
)
def test_taps_that_do_not_fit_are_refused(num_layers: int, num_taps: int, eligible: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=f"{num_taps} distinct taps do not fit a target of {num_layers} layers"):
        spread_taps(num_layers, num_taps, eligible)


@pytest.mark.parametrize("num_layers", [8, 30, 36, 48, 61, 94])
def test_every_number_of_taps_is_legal_or_refused(num_layers: int) -> None:
    for num_taps in range(1, num_layers + 1):
        try:
            taps = spread_taps(num_layers, num_taps)
        except ConfigError:
            assert num_taps > num_layers - 3
            continue
        assert len(taps) == num_taps <= num_layers - 3
        assert CaptureSpec(taps=taps).problem(num_layers) is None


def test_eagle3_taps() -> None:
    assert eagle3_taps(48) == (1, 23, 44)
    assert eagle3_taps(36) == (1, 17, 32)
    with pytest.raises(ConfigError, match="3 distinct taps do not fit a target of 4 layers"):
        eagle3_taps(4)


def test_bytes_per_token_of_the_design() -> None:
    dflash = CaptureSpec(taps=(1, 12, 23, 34, 45))
    eagle = CaptureSpec(taps=(1, 23, 44), final=True)
    assert dflash.bytes_per_token(2048) == 20_480
    assert eagle.bytes_per_token(2048) == 16_384
    assert CaptureSpec(taps=(), final=True, dtype="float32").bytes_per_token(576) == 2_304
    assert CaptureSpec(taps=(1,), dtype="float16").bytes_per_token(576) == 1_152


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


def test_the_dtype_is_one_of_three() -> None:
    with pytest.raises(msgspec.ValidationError, match="int8"):
        msgspec.convert({"taps": [1], "dtype": "int8"}, CaptureSpec)
