"""Random states for trainers that are timed without a target: values make no difference to the time."""

from __future__ import annotations

from typing import NamedTuple

import torch

from specd.protocol.capture import CaptureSpec


class MadeUp(NamedTuple):
    """taps [T, N, H], of T tokens, N layers, hidden size H, and final states [T, H]; None where not captured."""

    taps: torch.Tensor | None
    final: torch.Tensor | None = None


def made_up(spec: CaptureSpec, tokens: int, hidden: int, device: str | torch.device) -> MadeUp:
    """States that a target could have captured: normal, in the dtype of `spec`, on `device`, the same every time."""
    generator = torch.Generator(device).manual_seed(1)
    dtype: torch.dtype = getattr(torch, spec.dtype)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype, generator=generator)

    taps = random(tokens, len(spec.taps), hidden) if spec.taps else None
    return MadeUp(taps, random(tokens, hidden) if spec.final else None)
