"""The states of a batch as tensors of its slot, and the same batch as codes of float8.

Shape legend: T tokens of a batch, N taps, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specd.memory import fp8
from specd.protocol.batch import FINAL_SCALE, TAPS_SCALE, Layout


def views(buffer: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a batch in its buffer, uint8 [≥ layout.nbytes], by name."""
    return {
        ref.name: buffer[ref.offset : ref.offset + ref.nbytes].view(getattr(torch, ref.dtype)).view(ref.shape)
        for ref in layout.tensors
    }


def encode(states: Mapping[str, Tensor], codes: Mapping[str, Tensor]) -> None:
    """Fill the views of a batch in float8 from those of the same batch: taps [T, N, H], final [T, H], or one of them.

    Launched on the current stream of the device that all are on, as `decode` is.
    """
    if "taps" in states:
        taps = zip(states["taps"].unbind(1), codes["taps"].unbind(1), codes[TAPS_SCALE].unbind(), strict=True)
        for one, into, scales in taps:
            fp8.encode(one, into, scales)
    if "final" in states:
        fp8.encode(states["final"], codes["final"], codes[FINAL_SCALE])


def decode(codes: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
    """Fill the views of a batch from those of the same batch in float8."""
    if "taps" in states:
        fp8.decode(codes["taps"], codes[TAPS_SCALE], states["taps"])
    if "final" in states:
        fp8.decode(codes["final"][:, None], codes[FINAL_SCALE][None], states["final"][:, None])
