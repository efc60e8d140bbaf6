"""The stream of one communicator, on its own device."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

from specd.errors import TransportError

if TYPE_CHECKING:
    import torch

ROW_BYTES: Final = 64
_POOL: Final = 32
"""How many high-priority streams torch has for a device; it hands them out in turn, used or not."""


class Side:
    """A stream of its own on one device, which waits for no other, and copies and marks on it."""

    def __init__(self, device: str) -> None:
        import torch

        stream: Any = torch.cuda.Stream  # untyped
        self._device = device
        with _choosing:
            for _ in range(_POOL):
                # Of high priority: a few blocks get their SMs as a model's retire, not when its whole queue is done.
                self._stream = stream(device, priority=-1)
                if (device, self.handle) not in _sides:
                    break
            else:
                raise TransportError(f"{_POOL} NCCL communicators are open on {device}: it has no stream for another")
            _sides[device, self.handle] = self

    @property
    def handle(self) -> int:
        """The stream as a cudaStream_t."""
        return int(self._stream.cuda_stream)

    @staticmethod
    def on(device: str) -> AbstractContextManager[Any]:
        """Make a device the calling thread's; a new thread starts on device 0, which may be another trainer's."""
        import torch

        return torch.cuda.device(device)

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make this stream and its device the calling thread's."""
        import torch

        # The device first: a change of streams would leave a context on the device that the thread had before.
        with self.on(self._device), torch.cuda.stream(self._stream):
            yield

    def rows(self, count: int, *, on_host: bool) -> torch.Tensor:
        """Zeros, uint8 [count, ROW_BYTES], on the device or page-locked on the host."""
        import torch

        if on_host:
            return torch.zeros((count, ROW_BYTES), dtype=torch.uint8, pin_memory=True)
        rows = torch.zeros((count, ROW_BYTES), dtype=torch.uint8, device=self._device)
        torch.cuda.current_stream(self._device).synchronize()  # which may be another than this
        return rows

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """Copy once the stream, which is `current`, gets there; page-locked host memory is read no earlier."""
        into.copy_(source, non_blocking=True)

    def clear(self, into: torch.Tensor) -> None:
        """Fill with zeros once the stream, which is `current`, gets there."""
        into.zero_()

    def mark(self) -> Callable[[], bool]:
        """Whether all that is on the stream now is over, asked later."""
        import torch

        event_class: Any = torch.cuda.Event  # untyped
        event = event_class()
        event.record(self._stream)
        query: Callable[[], bool] = event.query
        return query

    def idle(self) -> bool:
        """Whether nothing is on the stream."""
        return bool(self._stream.query())


_choosing = threading.Lock()
_sides: weakref.WeakValueDictionary[tuple[str, int], Side] = weakref.WeakValueDictionary()
"""Streams in use, by device and handle: a transfer that waits for one trainer must not hold up another's."""
