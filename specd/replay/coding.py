"""Kept as float8: the image of a batch is then the slot of the same batch in that dtype, codes and a scale a row.

It is encoded on its way out of a slot and decoded on its way back, where the ring lies.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

from msgspec.structs import replace

from specd.memory import cuda, device_arena
from specd.memory.arena import HostArena
from specd.memory.device_arena import DeviceArena
from specd.protocol.batch import ALIGNMENT, Layout, slot_layout
from specd.protocol.capture import DTYPE_BYTES, FP8, SCALE_BYTES, CaptureSpec, StateDtype

if TYPE_CHECKING:
    import torch


class Coded(NamedTuple):
    """A batch that is kept as codes. states: the layout of its slot. codes: that of its image."""

    states: Layout
    codes: Layout

    @classmethod
    def of(cls, spec: CaptureSpec, layout: Layout) -> Coded | None:
        """How a batch is kept; None where its slot holds codes, which are its image as they lie."""
        if spec.scaled:
            return None
        num_tokens, *_, hidden_size = layout.tensors[0].shape
        return cls(layout, slot_layout(replace(spec, dtype=FP8), hidden_size, num_tokens))


class Coder:
    """Encodes slots of `ring` into cells, and back. Thread-safe.

    cell_bytes: room for the image of whatever fills a slot with states of `dtype` or a wider one, whole pages. On a GPU
    it takes as much memory there, once: its threads take turns, as their copies would.
    """

    def __init__(self, ring: HostArena | DeviceArena, hidden_size: int, dtype: StateDtype) -> None:
        rows = ring.slot_bytes // (hidden_size * DTYPE_BYTES[dtype])
        codes = -(-rows * (hidden_size + SCALE_BYTES) // ALIGNMENT) * ALIGNMENT
        # Up to four tensors: three of them begin at a page of their own.
        self.cell_bytes = codes + 3 * ALIGNMENT
        self._turn = threading.Lock()
        self._scratch: torch.Tensor | None = None
        if isinstance(ring, DeviceArena):
            self._scratch = device_arena.private_memory(self.cell_bytes, ring.device)
        _prepare(hidden_size, dtype, ring.device)

    def encode(self, slot: torch.Tensor, cell: torch.Tensor, coded: Coded, copier: cuda.Copier) -> None:
        """Fill a cell from a slot, both uint8. copier: of this thread."""
        if self._scratch is None:
            _encode(slot, cell, coded)
            return
        nbytes = coded.codes.nbytes
        with self._turn, copier.on(slot.device):
            _encode(slot, self._scratch, coded)
            cell[:nbytes].copy_(self._scratch[:nbytes], non_blocking=True)

    def decode(self, cell: torch.Tensor, slot: torch.Tensor, coded: Coded, copier: cuda.Copier) -> None:
        """Fill a slot from a cell."""
        if self._scratch is None:
            _decode(cell, slot, coded)
            return
        nbytes = coded.codes.nbytes
        with self._turn, copier.on(slot.device):
            self._scratch[:nbytes].copy_(cell[:nbytes], non_blocking=True)
            _decode(self._scratch, slot, coded)


def _prepare(hidden_size: int, dtype: StateDtype, device: str) -> None:
    """Load, and compile for a GPU, what the first batches would wait for; scales may begin at odd places."""
    import torch

    spec = CaptureSpec(taps=(0, 1), final=True, dtype=dtype)
    for num_tokens in (16, 17):
        layout = slot_layout(spec, hidden_size, num_tokens)
        coded = Coded.of(spec, layout)
        assert coded is not None
        if device == "cpu":
            slot, image = (torch.empty(each.nbytes, dtype=torch.uint8) for each in coded)
        else:
            slot, image = (device_arena.private_memory(each.nbytes, device) for each in coded)
        _encode(slot, image, coded)
        _decode(image, slot, coded)


def _encode(slot: torch.Tensor, image: torch.Tensor, coded: Coded) -> None:
    from specd.memory.states import encode, views

    encode(views(slot, coded.states), views(image, coded.codes))
    for gap in coded.codes.gaps():
        image[gap] = 0


def _decode(image: torch.Tensor, slot: torch.Tensor, coded: Coded) -> None:
    from specd.memory.states import decode, views

    decode(views(image, coded.codes), views(slot, coded.states))
    for gap in coded.states.gaps():
        slot[gap] = 0
