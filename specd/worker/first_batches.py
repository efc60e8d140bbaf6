"""The first batches of each spec: states that are NaN or infinite are found before a trainer gets them."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from specd.protocol.batch import TensorRef
from specd.protocol.capture import DTYPE_BYTES, FP8, CaptureSpec
from specd.targets.base import CaptureJob

if TYPE_CHECKING:
    from numpy.typing import NDArray

FIRST: Final = 4
"""Batches of a spec that are looked at: 16 ms for a slot of 96 MiB on one CPU core. A target that passed its trial may
still give NaN where sequences are long, or kernels are others; it seldom begins to later."""

_CHUNK_ROWS = 64
_INFINITY = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
"""Bits of infinity. Without its sign, a number's are smaller and a NaN's larger."""


class FirstBatches:
    """Counts the batches of each spec."""

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen: Counter[CaptureSpec] = Counter()

    def has(self, spec: CaptureSpec) -> bool:
        """Whether the next batch of a spec is among its first."""
        self._seen[spec] += 1
        return self._seen[spec] <= FIRST


def problem(fill: CaptureJob) -> str:
    """What is wrong with a filled slot's states, with the layer's number; empty if nothing is. Its bytes are in place.

    On a GPU it costs one reduction on a stream of its own, behind no forward that was launched meanwhile.
    """
    for ref in fill.layout.tensors:
        if ref.dtype == FP8:  # its scales tell
            continue
        bad_TK = _on_host(fill, ref) if isinstance(fill.slot, memoryview) else _on_device(fill, ref)
        if bad_TK is None or not bad_TK.any():
            continue
        column = int(bad_TK.any(axis=0).argmax())
        where = f"after layer {fill.spec.taps[column]}" if ref.name.startswith("taps") else "after the final norm"
        bad_T = bad_TK[:, column]
        return (
            f"the target's states {where} hold NaN or infinities in {int(bad_T.sum())} of {bad_T.size} rows of a "
            f"batch, first in row {int(bad_T.argmax())}; check its weights, or take --dtype bfloat16 or float32"
        )
    return ""


def _rows(fill: CaptureJob, ref: TensorRef, numbers: Any) -> Any:
    """A tensor's numbers as [T, K, H], its scales as [T, K, 1]."""
    size = fill.tokens.size
    return numbers.reshape(-1, size, 1).swapaxes(0, 1) if fill.spec.scaled else numbers.reshape(size, -1, ref.shape[-1])


def _on_host(fill: CaptureJob, ref: TensorRef) -> NDArray[np.bool_]:
    """Which rows hold no numbers: [T, K]."""
    stored: Any = np.uint32 if DTYPE_BYTES[ref.dtype] == 4 else np.uint16
    bits = np.frombuffer(fill.slot, stored, count=math.prod(ref.shape), offset=ref.offset)
    rows = _rows(fill, ref, bits)
    bad = np.empty(rows.shape[:2], np.bool_)
    infinity = stored(_INFINITY[ref.dtype])
    positive = stored(np.iinfo(stored).max >> 1)
    for start in range(0, len(rows), _CHUNK_ROWS):
        chunk = rows[start : start + _CHUNK_ROWS]
        bad[start : start + _CHUNK_ROWS] = (chunk & positive).max(axis=2) >= infinity
    return bad


def _on_device(fill: CaptureJob, ref: TensorRef) -> NDArray[np.bool_] | None:
    """The same for a slot on a GPU; None if all are numbers."""
    import torch

    slot: torch.Tensor = fill.slot
    rows = _rows(fill, ref, slot[ref.offset : ref.offset + ref.nbytes].view(getattr(torch, ref.dtype)))
    if slot.is_cuda:
        beside: Any = torch.cuda.Stream  # untyped
        with torch.cuda.stream(beside(slot.device)):
            return _bad_rows(rows)
    return _bad_rows(rows)


def _bad_rows(rows: Any) -> NDArray[np.bool_] | None:
    import torch

    # A sum is a number only if all its terms are, and takes no memory; one that overflows is looked into.
    if bool(torch.isfinite(rows.sum(dtype=torch.float32))):
        return None
    found: NDArray[np.bool_] = (~torch.isfinite(rows).all(dim=2)).cpu().numpy()
    return found
