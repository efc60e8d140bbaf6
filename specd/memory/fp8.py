"""float8 e4m3 with a scale a row: states in half the bytes of bfloat16, with three bits of mantissa.

A row is one tap of one token. Its scale is amax / 448 in float32, so that its largest value is e4m3's largest; codes
are value / scale, rounded to nearest even. A row of zeros has codes of zero. A row that holds NaN or an infinity has
NaN as its scale and in all its codes: it reads as NaN throughout, and can be found by its scale alone.
Bits are the same on every device. Shape legend: T tokens, N taps, H hidden size.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any, Final

import torch
from torch import Tensor

LARGEST: Final = 448.0
"""Of e4m3's numbers."""
LEAST_SCALE: Final = 2.0**-126
"""float32's smallest normal number: rows below 448 times this lose bits, and a row of zeros is divided by it."""
CHUNK_BYTES: Final = 1 << 20
"""float32 scratch of a step on a CPU: it stays in the cache."""
DEVICE_CHUNK_BYTES: Final = 32 << 20
"""The same on a GPU without triton, where a step costs its launches."""


def encode(states: Tensor, codes: Tensor, scales: Tensor, plus: Tensor | None = None) -> None:
    """Fill codes, float8_e4m3fn [T, H], and scales, float32 [T], from states [T, H], float32, bfloat16 or float16.

    plus: added to the states first, rounded as `states + plus` is, whatever its dtype. Codes and scales may be strided
    views; all are on one device, where the work is launched on the current stream.
    """
    if (kernel := _kernel(states)) is not None:
        kernel.encode(states, codes, scales, plus)
        return
    for start, end in _chunks(states):
        part = states[start:end]
        values = (part if plus is None else part + plus[start:end]).float()
        peak = values.abs().amax(dim=1, keepdim=True)
        # By a tensor: torch multiplies by the reciprocal of a number on a GPU, which rounds otherwise.
        scale = (peak / torch.full_like(peak, LARGEST)).clamp(min=LEAST_SCALE)
        broken = ~peak.isfinite()
        scale.masked_fill_(broken, torch.nan)
        values = (values / scale).clamp(-LARGEST, LARGEST).masked_fill_(broken, torch.nan)
        codes[start:end].copy_(values)
        scales[start:end].copy_(scale[:, 0])


def decode(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Fill out [T, N, H], of any float dtype, from codes, float8_e4m3fn of that shape, and scales, float32 [N, T].

    Products of code and scale in float32, rounded once. Launched on the current stream of the device all are on.
    """
    if (kernel := _kernel(codes)) is not None:
        kernel.decode(codes, scales, out)
        return
    scales_TN = scales.t()
    for start, end in _chunks(codes):
        out[start:end].copy_(codes[start:end].float().mul_(scales_TN[start:end, :, None]))


class Rows:
    """Rows of a slot whose states become codes as they are written: codes [T, H] and their scales [T].

    Written like a tensor, so that a target need not know of it.
    """

    __slots__ = ("codes", "scales")

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes = codes
        self.scales = scales

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.codes[rows], self.scales[rows])

    def copy_(self, states: Tensor) -> None:
        """Write states [T, H]."""
        encode(states, self.codes, self.scales)


def write_sum(out: Tensor | Rows, one: Tensor, other: Tensor) -> None:
    """Write one + other to `out` in one pass, all [T, H]."""
    if isinstance(out, Rows):
        encode(one, out.codes, out.scales, plus=other)
    else:
        torch.add(one, other, out=out)


def _chunks(rows: Tensor) -> list[tuple[int, int]]:
    """Ranges of the first dimension that take little float32 scratch."""
    most = DEVICE_CHUNK_BYTES if rows.is_cuda else CHUNK_BYTES
    step = max(1, most // (4 * max(1, rows[:1].numel())))
    return [(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]


def _kernel(tensor: Tensor) -> Any:
    """The module of the fused passes, for a tensor on a GPU where triton is."""
    return _fused() if tensor.is_cuda else None


@functools.cache
def _fused() -> Any:
    found = importlib.util.find_spec("triton") is not None
    return importlib.import_module("specd.memory.fp8_kernel") if found else None
