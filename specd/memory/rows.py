"""Copies of rows that lie apart in device memory, all pieces of a batch by one kernel.

The driver's two-dimensional copy moves rows of a few kilobytes at less than half the rate of a plain copy. This kernel
moves a row a block, 16 bytes a thread at a time, and leaves the caches to others: no byte is read or written twice.
"""

from __future__ import annotations

import functools
import logging
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from specd.protocol.cut import Piece

log = logging.getLogger(__name__)

WORD = 16
"""Bytes that a thread moves at once: addresses, widths and distances must be multiples of it."""
THREADS = 256
"""Most threads of a block."""
PIECES_A_LAUNCH = 8
FIELDS = len(Piece._fields)
TABLE = struct.Struct(f"{PIECES_A_LAUNCH * FIELDS}q")
"""The kernel's argument: pieces with the addresses of their first rows; widths and distances in words."""
BY_VALUE = np.dtype((np.void, TABLE.size))
"""Of a numpy array with one element, which a launch passes by value."""
SOURCE = """
struct Piece { const uint4* source; uint4* target; long long rows, width, pitch, step; };
struct Table { Piece pieces[PIECES]; };

extern "C" __global__ void copy_rows(const __grid_constant__ Table table) {
    const Piece& piece = table.pieces[blockIdx.y];
    const long long row = blockIdx.x;
    if (row >= piece.rows) return;
    const uint4* source = piece.source + row * piece.pitch;
    uint4* target = piece.target + row * piece.step;
    for (long long at = threadIdx.x; at < piece.width; at += blockDim.x) __stcs(target + at, __ldcs(source + at));
}
"""


class _Stream(NamedTuple):
    """A stream of the driver, as cupy's launch takes it (13, 14)."""

    ptr: int


def queue(source: int, target: int, pieces: Sequence[Piece], device: int, stream: int) -> Sequence[Piece]:
    """Queue copies of pieces between two addresses in device memory on a stream of `device`, the current one's ordinal.

    stream: its handle, as CUDA's runtime knows it. Returns those pieces that the driver should copy: of one row, or not
    of whole words, or all where there is no such kernel.
    Raises cupy's CUDADriverError for a launch that fails.
    """
    numbers: list[int] = []
    others: list[Piece] = []
    for piece in pieces:
        at, to, rows, width, pitch, step = piece
        at, to = source + at, target + to
        if rows > 1 and not (at | to | width | pitch | step) % WORD:
            numbers += at, to, rows, width // WORD, pitch // WORD, step // WORD
        else:
            others.append(piece)
    launch = _kernel(device) if numbers else None
    if launch is None:
        return pieces
    for begin in range(0, len(numbers), PIECES_A_LAUNCH * FIELDS):
        some = numbers[begin : begin + PIECES_A_LAUNCH * FIELDS]
        blocks, widest = (max(some[2::FIELDS]), len(some) // FIELDS), max(some[3::FIELDS])
        table = np.frombuffer(TABLE.pack(*some, *[0] * (PIECES_A_LAUNCH * FIELDS - len(some))), BY_VALUE)
        launch(blocks, (min(THREADS, -(-widest // 32) * 32),), (table,), 0, _Stream(stream))
    return others


@functools.cache
def _kernel(device: int) -> Any:
    """The kernel on the current device, `device`; None where it cannot be had, which costs speed alone."""
    try:
        import cupy

        return cupy.RawKernel(SOURCE, "copy_rows", (f"-DPIECES={PIECES_A_LAUNCH}",)).kernel
    except Exception as error:  # noqa: BLE001  whatever CUDA's compiler, its headers and its cache may raise
        reason = str(error).strip().splitlines()
        log.warning("rows are copied by the driver, at less than half the rate: %s", reason[-1] if reason else error)
        return None
