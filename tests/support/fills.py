"""Batches to capture for the tests of target backends, and what lies in their slots afterwards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from specd.memory.fp8 import decode, encode
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec
from specd.targets.base import CaptureJob

HIDDEN, VOCAB = 64, 256
LENGTHS = (7, 1, 23, 16)
TAPS = (0, 2, 4)
SPEC = CaptureSpec(taps=TAPS, final=True, dtype="float32")


def draw_tokens(count: int, seed: int = 0) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).astype(np.int32)


def make_fill(lengths: Sequence[int], spec: CaptureSpec = SPEC, *, seed: int = 0, hidden: int = HIDDEN) -> CaptureJob:
    num_tokens = sum(lengths)
    layout = slot_layout(spec, hidden, num_tokens)
    return CaptureJob(
        tokens=draw_tokens(num_tokens, seed),
        lengths=np.array(lengths, dtype=np.int32),
        spec=spec,
        layout=layout,
        slot=memoryview(bytearray(b"\xa5" * (layout.nbytes + 64))),
    )


def read(fill: CaptureJob) -> dict[str, torch.Tensor]:
    """The tensors in a slot, after a look at the bytes beyond them."""
    assert bytes(fill.slot[fill.layout.nbytes :]) == b"\xa5" * 64
    return {
        ref.name: torch.frombuffer(
            bytearray(fill.slot[ref.offset : ref.offset + ref.nbytes]), dtype=getattr(torch, ref.dtype)
        ).view(ref.shape)
        for ref in fill.layout.tensors
    }


def rounded(states: torch.Tensor) -> torch.Tensor:
    """Rows [..., H] that went to float8 and back."""
    rows = states.reshape(-1, states.shape[-1])
    codes, scales = torch.empty(rows.shape, dtype=torch.float8_e4m3fn), torch.empty(len(rows))
    encode(rows, codes, scales)
    decode(codes[:, None], scales[None], (out := torch.empty_like(rows))[:, None])
    return out.view(states.shape)
