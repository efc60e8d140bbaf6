"""Copies of rows that lie apart in device memory, all pieces of a batch by one kernel.

The driver's two-dimensional copy moves rows of a few kilobytes at less than half the rate of a plain copy. This kernel
moves a row a block, 16 bytes a thread at a time, and leaves the caches to others: no byte is read or written twice.
"""

from __future__ import annotations

import functools
import itertools
import logging
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from specd.protocol.cut import Piece

log = logging.getLogger(__name__)

WORD = 16
"""Bytes that a thread moves at once: addresses, widths and distances must be multiples of it."""
THREADS = 256
"""Most threads of a block."""
PIECES_A_LAUNCH = 8
FIELDS = len(Piece._fields)
TABLE = struct.Struct(f"{PIECES_A_LAUNCH * FIELDS}q")
"""The kernel's first argument: pieces, with everything but their number of rows in words."""
BY_VALUE = np.dtype((np.void, TABLE.size))
"""Of a numpy array with one element, which a launch passes by value."""
SOURCE = """
struct Piece { long long source, target, rows, width, pitch, step; };
struct Table { Piece pieces[PIECES]; };

extern "C" __global__ void copy_rows(const __grid_constant__ Table table, const uint4* source, uint4* target) {
    const Piece& piece = table.pieces[blockIdx.y];
    const long long row = blockIdx.x;
    if (row >= piece.rows) return;
    source += piece.source + row * piece.pitch;
    target += piece.target + row * piece.step;
    const int width = piece.width;
    for (int at = threadIdx.x; at < width; at += blockDim.x) __stcs(target + at, __ldcs(source + at));
}
"""


class _Stream(NamedTuple):
    """A stream of the driver, as cupy's launch takes it (13, 14)."""

    ptr: int


class _Launch(NamedTuple):
    """Up to PIECES_A_LAUNCH pieces. blocks: the most rows that one of them has, and how many pieces."""

    blocks: tuple[int, int]
    threads: tuple[int]
    table: NDArray[np.void]


def queue(source: int, target: int, pieces: tuple[Piece, ...], device: int, stream: int) -> Sequence[Piece]:
    """Queue copies of pieces between two addresses in device memory on a stream of `device`, the current one's ordinal.

    stream: its handle, as CUDA's runtime knows it. Returns those pieces that the driver should copy: of one row, or not
    of whole words, or all where there is no such kernel or one of the addresses is of no whole word.
    Raises cupy's CUDADriverError for a launch that fails.
    """
    launches, others = _planned(pieces) if not (source | target) % WORD else ((), pieces)
    kernel = _kernel(device) if launches else None
    if kernel is None:
        return pieces
    for blocks, threads, table in launches:
        kernel(blocks, threads, (table, source, target), 0, _Stream(stream))
    return others


@functools.lru_cache(maxsize=256)  # what a launch takes of Python counts: batches of one shape have the same pieces
def _planned(pieces: tuple[Piece, ...]) -> tuple[tuple[_Launch, ...], tuple[Piece, ...]]:
    """The launches, and the pieces that are for the driver."""
    in_words: list[Piece] = []
    others: list[Piece] = []
    for piece in pieces:
        source, target, rows, width, pitch, step = piece
        if rows > 1 and not (source | target | width | pitch | step) % WORD:
            in_words.append(Piece(source // WORD, target // WORD, rows, width // WORD, pitch // WORD, step // WORD))
        else:
            others.append(piece)
    launches: list[_Launch] = []
    for begin in range(0, len(in_words), PIECES_A_LAUNCH):
        some = in_words[begin : begin + PIECES_A_LAUNCH]
        widest = max(piece.width for piece in some)
        table = TABLE.pack(*itertools.chain(*some), *[0] * (FIELDS * (PIECES_A_LAUNCH - len(some))))
        launches.append(
            _Launch(
                blocks=(max(piece.rows for piece in some), len(some)),
                threads=(min(THREADS, -(-widest // 32) * 32),),
                table=np.frombuffer(table, BY_VALUE),
            )
        )
    return tuple(launches), tuple(others)


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
