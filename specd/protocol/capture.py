"""What to capture: taps, the final state, and their dtype; how many bytes a token costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import Meta

from specd.protocol.limits import MAX_TAPS

PlainDtype = Literal["float32", "bfloat16", "float16"]
"""What targets compute in, and drafts read."""
StateDtype = Literal["float32", "bfloat16", "float16", "float8_e4m3fn"]
"""What states travel as: plain, or e4m3 with a scale a row (`specd.memory.fp8`)."""
FP8: Final = "float8_e4m3fn"
SCALE_BYTES: Final = 4
DTYPE_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, FP8: 1}


class CaptureSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which hidden states of the target a trainer wants.

    taps: ascending 0-based decoder layers; tap i is the residual stream after layer i, un-normed
        (`hidden_states[i + 1]` of transformers).
    final: whether the last hidden state after the final norm (what lm_head reads) is captured too.
    dtype: element type of the states as they travel. float8_e4m3fn has a float32 scale for each tap of a token, and is
        delivered decoded, in the target's dtype.
    """

    taps: Annotated[tuple[int, ...], Meta(max_length=MAX_TAPS)]
    final: bool = False
    dtype: StateDtype = "bfloat16"

    def bytes_per_token(self, hidden_size: int) -> int:
        """Bytes one token occupies: (taps + final) · (hidden_size · element size + 4 for the scale of float8)."""
        scale = SCALE_BYTES if self.scaled else 0
        return (len(self.taps) + self.final) * (hidden_size * DTYPE_BYTES[self.dtype] + scale)

    @property
    def scaled(self) -> bool:
        """Whether its states are codes that have scales."""
        return self.dtype == FP8

    @property
    def title(self) -> str:
        """As in `5 taps + final`."""
        return f"{len(self.taps)} tap{'s' * (len(self.taps) != 1)}{' + final' * self.final}"

    @property
    def sizing(self) -> tuple[str, ...]:
        """The settings of a daemon whose slots hold it."""
        return (
            f"capture.num_taps={len(self.taps)}",
            f"capture.final={str(self.final).lower()}",
            f"capture.dtype={self.dtype}",
        )

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


def plain(dtype: str) -> PlainDtype:
    """The dtype that states of a target of `dtype` are read in: that one, or bfloat16 where it is none for states."""
    return next((known for known in get_args(PlainDtype) if known == dtype), "bfloat16")


def covers(held: CaptureSpec | None, want: CaptureSpec | None) -> bool:
    """Whether states that are `held` contain all that is wanted. None, as of a probe, goes with None alone."""
    if held is None or want is None:
        return held is want
    return held.dtype == want.dtype and held.final >= want.final and set(held.taps) >= set(want.taps)


def union(specs: Iterable[CaptureSpec]) -> CaptureSpec:
    """The least spec that covers each of one or more of one dtype. Raises ValueError where dtypes differ."""
    found = list(specs)
    dtypes = sorted({spec.dtype for spec in found})
    if len(dtypes) != 1:
        raise ValueError(f"specs of dtypes {', '.join(dtypes) or 'none'} have no union: expected one dtype")
    taps = tuple(sorted({tap for spec in found for tap in spec.taps}))
    return CaptureSpec(taps=taps, final=any(spec.final for spec in found), dtype=found[0].dtype)
