"""What of a slot is put in order before a target writes to it: the bytes between tensors, and scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specd.protocol.batch import FINAL_SCALE, TAPS_SCALE, Layout

if TYPE_CHECKING:
    import torch


def blank(slot: memoryview | torch.Tensor, layout: Layout) -> None:
    """Zero what no target writes, and make every scale NaN, so that a target that does not know of scales is found."""
    for span in layout.gaps():
        _fill(slot, span, 0)
    for ref in layout.tensors:
        if ref.name in (TAPS_SCALE, FINAL_SCALE):
            _fill(slot, slice(ref.offset, ref.offset + ref.nbytes), 0xFF)


def _fill(slot: memoryview | torch.Tensor, span: slice, byte: int) -> None:
    if isinstance(slot, memoryview):
        slot[span] = bytes([byte]) * (span.stop - span.start)
    else:
        slot[span] = byte
