"""Copies of rows that lie apart in device memory, all pieces of a batch by one kernel.

The driver's two-dimensional copy moves rows of a few kilobytes at less than half the rate of a plain copy. This kernel
moves 16 bytes a thread at a time, from several rows before it writes any, so that enough reads are under way.
"""

from __future__ import annotations

import functools
import logging
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from specd.protocol.cut import Piece

log = logging.getLogger(__name__)

WORD = 16
"""Bytes that a thread moves at once: addresses, widths and distances must be multiples of it."""
MOST = 16
"""Pieces of a launch."""
THREADS = 256
"""Of a block, at most; where no row has so many words, it has fewer."""
ROWS = 4
"""That a block reads before it writes."""
WORDS = MOST * len(Piece._fields)
PACK = struct.Struct(f"{WORDS}q")
TABLE = np.dtype((np.void, PACK.size))
"""Pieces with the addresses of their first rows, widths and distances in words, as the kernel takes them: by value."""
SOURCE = """
struct Piece { const uint4* source; uint4* target; long long rows, width, pitch, step; };
struct Table { Piece pieces[MOST]; };

extern "C" __global__ void copy_rows(const __grid_constant__ Table table) {
    const Piece& piece = table.pieces[blockIdx.y];
    const long long first = (long long)blockIdx.x * ROWS;
    const uint4* source = piece.source + first * piece.pitch;
    uint4* target = piece.target + first * piece.step;
    for (long long at = threadIdx.x; at < piece.width; at += blockDim.x) {
        uint4 words[ROWS];
        #pragma unroll
        for (int row = 0; row < ROWS; ++row)
            if (first + row < piece.rows) words[row] = source[row * piece.pitch + at];
        #pragma unroll
        for (int row = 0; row < ROWS; ++row)
            if (first + row < piece.rows) target[row * piece.step + at] = words[row];
    }
}
"""


def queue(source: int, target: int, pieces: Sequence[Piece], stream: Any) -> Sequence[Piece]:
    """Queue copies of pieces between two addresses on cupy's `stream`, which is one of the current device.

    Returns those that the driver should copy: of one row, or not of whole words, or all where there is no such kernel.
    """
    words: list[int] = []
    others: list[Piece] = []
    for piece in pieces:
        at, to, rows, width, pitch, step = piece
        at, to = source + at, target + to
        if rows > 1 and not (at | to | width | pitch | step) % WORD:
            words += at, to, rows, width // WORD, pitch // WORD, step // WORD
        else:
            others.append(piece)
    kernel = _kernel() if words else None
    if kernel is None:
        return pieces
    for begin in range(0, len(words), WORDS):
        some = words[begin : begin + WORDS]
        widest = max(some[3 :: len(Piece._fields)])
        blocks = -(-max(some[2 :: len(Piece._fields)]) // ROWS), len(some) // len(Piece._fields)
        table = np.frombuffer(PACK.pack(*some, *[0] * (WORDS - len(some))), TABLE)
        kernel.kernel(blocks, (min(THREADS, -(-widest // 32) * 32),), (table,), 0, stream)
    return others


@functools.cache
def _kernel() -> Any:
    """Compiled once a process; None where it cannot be, which costs speed alone."""
    try:
        import cupy

        kernel = cupy.RawKernel(SOURCE, "copy_rows", (f"-DROWS={ROWS}", f"-DMOST={MOST}"))
        kernel.compile()
    except Exception as error:  # noqa: BLE001  whatever CUDA's compiler, its headers and its cache may raise
        reason = str(error).strip().splitlines()
        log.warning("rows are copied by the driver, at less than half the rate: %s", reason[-1] if reason else error)
        return None
    return kernel
