"""The states of a delivery: views of its buffer, or what they decode to where they travelled as float8."""

from __future__ import annotations

import torch
from msgspec.structs import replace

from specd.memory.states import decode, views
from specd.memory.streams import allocate
from specd.protocol.batch import Layout, slot_layout
from specd.protocol.capture import CaptureSpec, PlainDtype, plain


class States:
    """What a subscriber's deliveries are made of. read_as: what float8 states become. dtype: of its deliveries.

    float8 states are decoded on the training thread, on its current stream. All deliveries share one buffer, since the
    kernels that read the last one come before on that stream; what is in flight takes the bytes of float8 alone.
    """

    __slots__ = ("_buffer", "_device", "_hidden_size", "_scaled", "_spec", "dtype")

    def __init__(self, spec: CaptureSpec, hidden_size: int, read_as: str, device: str) -> None:
        self._scaled = spec.scaled
        self.dtype: PlainDtype = plain(read_as if spec.scaled else spec.dtype)
        self._spec = replace(spec, dtype=self.dtype)
        self._hidden_size = hidden_size
        self._device = device
        self._buffer: torch.Tensor | None = None

    def of(self, fetched: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
        """taps [T, N, H] and final [T, H], as far as they are captured, of a batch that was fetched.

        They stay until the next call, or as long as `fetched` where nothing is decoded.
        """
        found = views(fetched, layout)
        if not self._scaled:
            return found
        num_tokens = layout.tensors[0].shape[0]
        own = slot_layout(self._spec, self._hidden_size, num_tokens)
        states = views(self._room(own.nbytes), own)
        decode(found, states)
        return states

    def _room(self, nbytes: int) -> torch.Tensor:
        """The buffer, uint8 [≥ nbytes]."""
        if self._buffer is None or self._buffer.numel() < nbytes:
            self._buffer = None  # before there is a larger one
            self._buffer = allocate(nbytes, self._device)
        return self._buffer
