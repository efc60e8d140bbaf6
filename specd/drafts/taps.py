"""Which layers of the target a draft taps."""

from __future__ import annotations

import itertools

from specd.errors import ConfigError


def spread_taps(num_layers: int, num_taps: int, eligible: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Evenly spaced taps, from early to late (arXiv 2602.06036, as in its published checkpoints).

    num_layers: decoder layers of the target. eligible: the only layers that may be tapped (hybrid attention), empty for
    all; the first and the last of them are always included. Raises ConfigError when the taps would not be distinct.
    """
    if eligible and len(eligible) < num_taps:
        taps = list(eligible)
    elif eligible:
        last = len(eligible) - 1
        picks = [last // 2] if num_taps == 1 else [round(k * last / (num_taps - 1)) for k in range(num_taps)]
        taps = [eligible[i] for i in picks]
    elif num_taps == 1:
        taps = [num_layers // 2]
    else:
        taps = [round(1 + k * (num_layers - 4) / (num_taps - 1)) for k in range(num_taps)]
    return _distinct(taps, num_layers, num_taps)


def eagle3_taps(num_layers: int) -> tuple[int, ...]:
    """The three EAGLE-3 taps (arXiv 2503.01840): early, middle, late. Raises ConfigError for a target too shallow."""
    if num_layers < 7:
        raise ConfigError(
            f"EAGLE-3 reads three layers of its target: expected one of 7 layers at least, not {num_layers}"
        )
    return _distinct([1, num_layers // 2 - 1, num_layers - 4], num_layers, 3)


def _distinct(taps: list[int], num_layers: int, num_taps: int) -> tuple[int, ...]:
    legal = all(0 <= tap <= num_layers - 2 for tap in taps)
    if num_taps != len(taps) or not taps or not legal or any(a >= b for a, b in itertools.pairwise(taps)):
        raise ConfigError(
            f"{num_taps} distinct taps do not fit a target of {num_layers} layers (got {taps}): ask for fewer"
        )
    return tuple(taps)
