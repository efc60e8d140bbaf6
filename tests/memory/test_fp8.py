"""float8 with a scale a row: every value becomes the nearest code, and nothing becomes zero that is no number."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specd.memory import fp8
from specd.memory.fp8 import LARGEST, LEAST_SCALE, Rows, decode, encode, write_sum

CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def encoded(states: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(states.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(len(states))
    encode(states, codes, scales)
    return codes, scales


def decoded(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(codes.shape, dtype=dtype)
    decode(codes[:, None], scales[None], out[:, None])
    return out


rows = st.lists(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=5, max_size=5), min_size=1, max_size=4
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(rows, st.sampled_from(DTYPES))
def test_every_value_becomes_the_nearest_code(values: list[list[float]], dtype: torch.dtype) -> None:
    states = torch.tensor(values).to(dtype).nan_to_num(0, 0, 0)
    codes, scales = encoded(states)
    exact, step = states.double(), scales.double()[:, None]
    assert torch.equal(scales, (states.float().abs().amax(1) / torch.tensor(LARGEST)).clamp(min=LEAST_SCALE))
    numbers = CODES.double().nan_to_num(0)
    found = codes.double() * step
    least = (exact[..., None] - numbers * step[..., None]).abs().amin(-1)
    assert ((exact - found).abs() <= least + 1e-7 * exact.abs()).all()  # the quotient is rounded to float32 once
    assert ((exact - found).abs() <= exact.abs() / 16 + step * 2.0**-10 * 1.0001).all(), "half of the last place"
    assert torch.equal(decoded(codes, scales), codes.float() * scales[:, None])
    assert torch.isfinite(decoded(codes, scales, dtype)).all()
    peak = exact.abs().amax(1)
    normal = peak > LARGEST * LEAST_SCALE
    largest = decoded(codes, scales, dtype).double().abs().amax(1)
    off = 2.0**-23 if dtype == torch.float32 else 0.0
    assert ((largest - peak).abs() <= off * peak)[normal].all(), "the largest value of a row stays what it was"


def test_ties_go_to_the_even_code() -> None:
    numbers = CODES[:127].float()
    codes, scales = encoded(torch.cat([(numbers[:-1] + numbers[1:]) / 2, torch.tensor([LARGEST])])[None])
    assert scales.item() == 1.0
    assert codes.view(torch.uint8)[0, :-1].tolist() == [code + code % 2 for code in range(126)]


def test_a_row_without_numbers_reads_as_nan_and_zeros_stay_zeros() -> None:
    states = torch.randn(6, 64)
    states[1], states[2, 5], states[3, 7], states[4, 0] = 0, torch.nan, torch.inf, -torch.inf
    codes, scales = encoded(states)
    found = decoded(codes, scales, torch.bfloat16)
    assert scales.isnan().tolist() == [False, False, True, True, True, False]
    assert found.isnan().all(1).tolist() == scales.isnan().tolist()
    assert set(codes.view(torch.uint8)[2:5].flatten().tolist()) == {0x7F}
    assert not found[1].any()
    assert torch.isfinite(found[[0, 1, 5]]).all()


def test_the_largest_and_the_least_rows_stay_numbers() -> None:
    top = torch.finfo(torch.float32).max
    found = decoded(*encoded(torch.tensor([[top, -top, 1.0], [5e-36, 1e-45, 0.0], [1e-44, -1e-45, 0.0]])))
    assert found[0].tolist() == [top, -top, 0.0]
    assert math.isclose(found[1, 0].item(), 5e-36, rel_tol=1 / 16)
    assert not found[2].any(), "below 2⁻¹³⁶ there is no code"


def test_small_steps_and_strided_places_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    states, more = torch.randn(2, 33, 48, dtype=torch.bfloat16)
    codes, scales = encoded(states)
    summed = encoded(states + more)
    monkeypatch.setattr(fp8, "CHUNK_BYTES", 1000)
    wide, tall = torch.zeros(33, 3, 48, dtype=torch.float8_e4m3fn), torch.zeros(3, 33)
    Rows(wide[:, 1], tall[1]).copy_(states)
    assert torch.equal(wide[:, 1].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(tall[1], scales)
    assert not wide.view(torch.uint8)[:, ::2].any()
    part = Rows(wide[:, 2], tall[2])[5:20]
    write_sum(part, states[5:20], more[5:20])
    assert torch.equal(wide[5:20, 2].view(torch.uint8), summed[0].view(torch.uint8)[5:20])
    assert torch.equal(tall[2], torch.where((torch.arange(33) >= 5) & (torch.arange(33) < 20), summed[1], 0))
    out = torch.empty(33, 3, 48, dtype=torch.bfloat16)
    decode(wide, tall, out)
    assert torch.equal(out[:, 1], decoded(codes, scales, torch.bfloat16))
    plain = torch.empty(33, 48)
    write_sum(plain, states, more)
    assert torch.equal(plain, (states + more).float())
