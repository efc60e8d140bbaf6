"""What to capture: taps, the final state, and their dtype; how many bytes a token costs."""

from __future__ import annotations

import itertools
from typing import Literal

import msgspec

from specd.errors import ConfigError

StateDtype = Literal["float32", "bfloat16", "float16"]
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class CaptureSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which hidden states of the target a trainer wants.

    taps: ascending 0-based decoder layers; tap i is the residual stream after layer i, un-normed
        (`hidden_states[i + 1]` of transformers).
    final: whether the last hidden state after the final norm (what lm_head reads) is captured too.
    dtype: element type of the delivered states.
    """

    taps: tuple[int, ...]
    final: bool = False
    dtype: StateDtype = "bfloat16"

    def bytes_per_token(self, hidden_size: int) -> int:
        """Bytes one token occupies: (taps + final) · hidden_size · element size."""
        return (len(self.taps) + self.final) * hidden_size * DTYPE_BYTES[self.dtype]

    def problem(self, num_layers: int) -> str | None:
        """Why this spec cannot be captured from a target of `num_layers` layers, or None if it can."""
        if not self.taps and not self.final:
            return "captures nothing: give at least one tap, or final"
        if any(a >= b for a, b in itertools.pairwise(self.taps)):
            return f"taps {list(self.taps)} are not strictly ascending"
        if self.taps and not (self.taps[0] >= 0 and self.taps[-1] <= num_layers - 2):
            return (
                f"taps {list(self.taps)} leave the legal range 0…{num_layers - 2} of a target with {num_layers} "
                f"layers; for the state after the last layer ask for `final`"
            )
        return None


def dflash_taps(num_layers: int, num_taps: int, eligible: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Evenly spaced DFlash taps (arXiv 2602.06036, as in its published checkpoints).

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
    """The three EAGLE-3 taps (arXiv 2503.01840): early, middle, late."""
    return _distinct([1, num_layers // 2 - 1, num_layers - 4], num_layers, 3)


def _distinct(taps: list[int], num_layers: int, num_taps: int) -> tuple[int, ...]:
    legal = all(0 <= tap <= num_layers - 2 for tap in taps)
    if num_taps != len(taps) or not taps or not legal or any(a >= b for a, b in itertools.pairwise(taps)):
        raise ConfigError(
            f"{num_taps} distinct taps do not fit a target of {num_layers} layers (got {taps}): ask for fewer"
        )
    return tuple(taps)
