"""Cutting a trainer's own states out of a slot that holds more: which bytes go where, whatever moves them.

Shape legend: T tokens of a batch, N taps held, n taps wanted, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from specd.protocol.batch import FINAL_SCALE, TAPS_SCALE, slot_layout
from specd.protocol.capture import DTYPE_BYTES, SCALE_BYTES, CaptureSpec, covers


class Piece(NamedTuple):
    """`rows` rows of `width` bytes: row r lies at source + r · pitch of the slot, and at target + r · step at home."""

    source: int
    target: int
    rows: int
    width: int
    pitch: int
    step: int


def cut(held: CaptureSpec, own: CaptureSpec, hidden_size: int, num_tokens: int) -> tuple[Piece, ...]:
    """The pieces that make [T, n, H] and `final` of a slot that holds [T, N, H] and perhaps `final`.

    One for each run of adjacent taps, and one for `final`; as many again for scales; none if both are the same. Bytes
    between tensors are of no piece. Raises ValueError when `own` is not covered.
    """
    if held == own:
        return ()
    if not covers(held, own):
        raise ValueError(f"{own} cannot be cut out of {held}")
    here = {ref.name: ref for ref in slot_layout(held, hidden_size, num_tokens).tensors}
    there = {ref.name: ref for ref in slot_layout(own, hidden_size, num_tokens).tensors}
    pieces: list[Piece] = []
    state, scales = hidden_size * DTYPE_BYTES[own.dtype], num_tokens * SCALE_BYTES
    pitch, step = len(held.taps) * state, len(own.taps) * state
    runs = _adjacent([held.taps.index(tap) for tap in own.taps])
    for first, place, count in runs:
        pieces.append(_whole(Piece(place * state, first * state, num_tokens, count * state, pitch, step)))
    for first, place, count in runs if own.scaled else ():
        source, target = here[TAPS_SCALE].offset + place * scales, there[TAPS_SCALE].offset + first * scales
        pieces.append(_row(source, target, count * scales))
    pieces += [
        _row(here[name].offset, there[name].offset, there[name].nbytes)
        for name in ("final", FINAL_SCALE)
        if name in there
    ]
    return tuple(pieces)


def gather(slot: memoryview, pieces: Sequence[Piece], begin: int, end: int) -> memoryview:
    """Bytes [begin, end) of what the pieces make of a slot; those of no piece are 0."""
    held, made = np.frombuffer(slot, np.uint8), np.zeros(end - begin, np.uint8)
    for piece in pieces:
        first = max(0, (begin - piece.target - piece.width) // piece.step + 1)
        last = min(piece.rows, -(-(end - piece.target) // piece.step)) - 1
        inner = range(first + 1, last)
        for row in {first, last} if first <= last else ():
            at = piece.target + row * piece.step
            low, high = max(begin, at), min(end, at + piece.width)
            source = piece.source + row * piece.pitch - at
            made[low - begin : high - begin] = held[source + low : source + high]
        if inner:
            shape = (len(inner), piece.width)
            source, target = piece.source + inner[0] * piece.pitch, piece.target + inner[0] * piece.step - begin
            as_strided(made[target:], shape, (piece.step, 1))[:] = as_strided(held[source:], shape, (piece.pitch, 1))
    return made.data


def _adjacent(places: list[int]) -> list[tuple[int, int, int]]:
    """Runs of places that follow one another, as (index of the first, its place, how many)."""
    runs: list[tuple[int, int, int]] = []
    for index, place in enumerate(places):
        if runs and runs[-1][1] + runs[-1][2] == place:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((index, place, 1))
    return runs


def _whole(piece: Piece) -> Piece:
    """The piece as one row, if its rows follow one another on both sides."""
    if not piece.width == piece.pitch == piece.step:
        return piece
    return _row(piece.source, piece.target, piece.rows * piece.width)


def _row(source: int, target: int, nbytes: int) -> Piece:
    return Piece(source, target, 1, nbytes, nbytes, nbytes)
