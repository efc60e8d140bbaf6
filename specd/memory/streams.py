"""CUDA streams: points of their work that a thread can wait for, and buffers that any stream may write."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from specd.protocol.batch import ALIGNMENT


class Point(Protocol):
    """A point of a stream's work; a CUDA event is one."""

    def synchronize(self) -> None:
        """Wait until the stream has come to it."""


def reached(device: str) -> Point | None:
    """The point that the calling thread's current stream on `device` has been told to come to; None on the CPU."""
    if not device.startswith("cuda"):
        return None
    event: Any = torch.cuda.Event  # untyped
    point: Any = event(blocking=True)  # a waiting thread sleeps
    point.record(torch.cuda.current_stream(device))
    return point  # type: ignore[no-any-return]


def on_device(device: str) -> None:
    """Make `device` the calling thread's own: a thread starts on device 0, whatever its parent chose."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)


def allocate(nbytes: int, device: str) -> torch.Tensor:
    """A page-aligned buffer on `device`, uint8 [≥ nbytes], that any stream may write at once."""
    size = -(-nbytes // ALIGNMENT) * ALIGNMENT
    raw = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=device)
    if raw.is_cuda:
        # The allocator hands out memory that kernels of this stream may still read, and transports copy on others.
        torch.cuda.current_stream(raw.device).synchronize()
    return raw[-raw.data_ptr() % ALIGNMENT :][:size]
