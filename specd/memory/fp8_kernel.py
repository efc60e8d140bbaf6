"""The passes of `specd.memory.fp8` on a GPU, one program a row: every value is read once and written once.

Needs triton, so it is imported only where there is a GPU. Codes are made by integer arithmetic, since not every GPU has
an instruction for them. Shape legend: T tokens, N taps, H hidden size.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

LARGEST = tl.constexpr(448.0)
LEAST_SCALE = tl.constexpr(2.0**-126)
INFINITY = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)


@triton.jit  # type: ignore[untyped-decorator]
def _encode(  # type: ignore[no-untyped-def] # triton reads annotations as code
    states,
    plus,
    codes,
    scales,
    state_stride,
    plus_stride,
    code_stride,
    scale_stride,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    PLUS: tl.constexpr,
    ROUND: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    inside = column < HIDDEN
    value = tl.load(states + row * state_stride + column, mask=inside, other=0.0)
    if PLUS:
        other = tl.load(plus + row * plus_stride + column, mask=inside, other=0.0)
        value = value.to(tl.float32) + other.to(tl.float32)
        if ROUND:  # as a sum of one dtype is
            value = value.to(states.dtype.element_ty)
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    # As integers, infinity is above every number and NaN above infinity.
    top = tl.max(bits & 0x7FFFFFFF, 0)
    broken = top >= INFINITY
    scale = tl.maximum(tl.div_rn(top.to(tl.float32, bitcast=True), LARGEST), LEAST_SCALE)

    size = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    quotient = tl.minimum(tl.div_rn(size, scale), LARGEST)
    near = quotient.to(tl.int32, bitcast=True)
    # Round to nearest even: at bit 20 the last of three bits of mantissa; below 2⁻⁶ at multiples of 2⁻⁹.
    normal = ((near + 0x7FFFF + ((near >> 20) & 1)) >> 20) - (120 << 3)
    small = (quotient + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(quotient < 0.015625, small, normal) | ((bits >> 24) & 0x80)
    code = tl.where(broken, 0x7F, code)
    tl.store(codes + row * code_stride + column, code.to(tl.uint8), mask=inside)
    tl.store(scales + row * scale_stride, tl.where(broken, NAN, scale.to(tl.int32, bitcast=True)))


@triton.jit  # type: ignore[untyped-decorator]
def _decode(  # type: ignore[no-untyped-def] # triton reads annotations as code
    codes,
    scales,
    out,
    code_stride,
    out_stride,
    scale_stride,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
):
    token, tap = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, SIZE)
    inside = column < HIDDEN
    code = tl.load(codes + token * code_stride + tap * HIDDEN + column, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + tap.to(tl.int64) * scale_stride + token)
    size = code & 0x7F
    # A normal code is the exponent and mantissa of a float32, but for its bias.
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    signed = value.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)
    signed = tl.where(size == 0x7F, NAN, signed)
    product = signed.to(tl.float32, bitcast=True) * scale
    place = out + token * out_stride + tap * HIDDEN + column
    tl.store(place, product.to(out.dtype.element_ty), mask=inside)


def encode(states: Tensor, codes: Tensor, scales: Tensor, plus: Tensor | None) -> None:
    """See `fp8.encode`; rows are contiguous, their strides are free. Scales are stored as bits."""
    rows, hidden = states.shape
    pair = (states, states if plus is None else plus)
    states, other = (each if each.stride(1) == 1 else each.contiguous() for each in pair)
    if not rows:
        return
    with torch.cuda.device(states.device):
        _encode[(rows,)](
            states,
            other,
            codes.view(torch.uint8),
            scales.view(torch.int32),
            states.stride(0),
            other.stride(0),
            codes.stride(0),
            scales.stride(0),
            HIDDEN=hidden,
            SIZE=triton.next_power_of_2(hidden),
            PLUS=plus is not None,
            ROUND=other.dtype == states.dtype,
            num_warps=_warps(hidden),
        )


def decode(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """See `fp8.decode`; the taps of a token are contiguous."""
    tokens, taps, hidden = codes.shape
    if not tokens:
        return
    with torch.cuda.device(codes.device):
        _decode[(tokens, taps)](
            codes.view(torch.uint8),
            scales,
            out,
            codes.stride(0),
            out.stride(0),
            scales.stride(0),
            HIDDEN=hidden,
            SIZE=triton.next_power_of_2(hidden),
            num_warps=_warps(hidden),
        )


def _warps(hidden: int) -> int:
    """So many that a thread has 16 to 32 values; kernels want a power of 2."""
    return 1 << (max(1, min(16, hidden // 512)).bit_length() - 1)
