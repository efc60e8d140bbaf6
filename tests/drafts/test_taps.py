"""Which layers are tapped, against the numbers of the published checkpoints."""

from __future__ import annotations

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
    assert eagle3_taps(7) == (1, 2, 3)
    with pytest.raises(ConfigError, match="reads three layers of its target: expected one of 7 layers at least, not 6"):
        eagle3_taps(6)
