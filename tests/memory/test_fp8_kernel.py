"""The fused passes on a GPU give the bits of the plain ones, there and on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specd.memory import fp8

pytestmark = pytest.mark.gpu(1)
T, N = 300, 3


def made(dtype: torch.dtype, hidden: int) -> tuple[Tensor, Tensor]:
    """Rows of all sizes that the dtype has, and some of odd values: [N, T, H] each."""
    generator = torch.Generator().manual_seed(hidden)
    low, high = (-7.0, 4.0) if dtype == torch.float16 else (-42.0, 37.0)
    states, more = torch.randn(2, N, T, hidden, generator=generator)
    states = (states * torch.logspace(low, high, T)[:, None]).to(dtype)
    states[0, 1], states[1, 2, 3], states[2, 3, 4], states[0, 5] = 0, torch.nan, -torch.inf, -0.0
    states[1, 6] = torch.finfo(dtype).max
    states[:, 7] = torch.arange(hidden).to(dtype) / 8  # ties
    return states, more.to(dtype)


def passed(states: Tensor, more: Tensor | None) -> list[Tensor]:
    """Bits of codes, scales and what they decode to."""
    device, hidden = states.device, states.shape[2]
    codes = torch.zeros(T, N, hidden, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.zeros(N, T, device=device)
    for k in range(N):
        fp8.encode(states[k], codes[:, k], scales[k], None if more is None else more[k])
    found = [codes.view(torch.uint8), scales.view(torch.int32)]
    for dtype, bits in ((torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)):
        out = torch.empty(T, N, hidden, dtype=dtype, device=device)
        fp8.decode(codes, scales, out)
        found.append(torch.where(out.isnan(), 0, out.view(bits)))  # NaN has many bits
    return [each.cpu() for each in found]


@pytest.mark.parametrize("hidden", [48, 576, 2880, 4096, 7168])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_are_the_same_on_every_device(dtype: torch.dtype, hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    states, more = made(dtype, hidden)
    for plus in (None, more, more.float()):
        on_cpu = passed(states, plus)
        fused = passed(states.cuda(), None if plus is None else plus.cuda())
        assert all(torch.equal(one, other) for one, other in zip(on_cpu, fused, strict=True)), "triton"
        with monkeypatch.context() as without:
            without.setattr(fp8, "_kernel", lambda tensor: None)
            unfused = passed(states.cuda(), None if plus is None else plus.cuda())
        assert all(torch.equal(one, other) for one, other in zip(on_cpu, unfused, strict=True)), "torch"
    assert fp8._kernel(states.cuda()) is not None


def test_encoding_takes_no_memory_beside_its_codes() -> None:
    states = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
    codes, scales = torch.empty(4096, 4096, dtype=torch.float8_e4m3fn, device="cuda"), torch.empty(4096, device="cuda")
    fp8.encode(states, codes, scales)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fp8.encode(states, codes, scales)
    fp8.decode(codes[:, None], scales[None], states[:, None])
    assert torch.cuda.max_memory_allocated() == before
