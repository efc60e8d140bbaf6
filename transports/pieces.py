"""What a reference names of a slot, as pairs of tensors: for whatever copies between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from specd.protocol.cut import Piece

if TYPE_CHECKING:
    import torch


def pairs(
    pieces: Sequence[Piece], into: torch.Tensor, slot: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Where each piece goes and where it lies: views of `into` and `slot`, contiguous uint8 vectors, of one shape.

    Rows are of the widest words that fit all of them, as a GPU copies single bytes at a fraction of its rate.
    """
    for source, target, rows, width, pitch, step in pieces:
        # Not as_strided with an offset: that would be one into the storage, of which this may be a part.
        there, here = slot[source:], into[target:]
        places = (int(at) for each in (here, there) for at in (each.data_ptr(), each.storage_offset()))
        word = _word(width, pitch, step, *places) if rows > 1 else None
        yield _rows(here, rows, width, step, word), _rows(there, rows, width, pitch, word)


def _rows(memory: torch.Tensor, rows: int, width: int, pitch: int, word: torch.dtype | None) -> torch.Tensor:
    found = memory.as_strided((rows, width), (pitch, 1))
    return found if word is None else found.view(word)


def _word(*numbers: int) -> torch.dtype | None:
    """The widest type that all these bytes are multiples of; None for single bytes."""
    import torch

    for word in (torch.int64, torch.int32, torch.int16):
        if not any(number % word.itemsize for number in numbers):
            return word
    return None
