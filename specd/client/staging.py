"""Staging buffers: where fetched bytes lie, and the wait until the training stream has read them."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

import torch

from specd.client.changed import Changed
from specd.client.guard import Guard
from specd.memory.streams import Point, allocate, on_device


class Afterwards:
    """Runs actions once the training stream has come to a point, in order, on a thread that the first one starts."""

    def __init__(self, device: str, guard: Guard) -> None:
        self._device = device
        self._guard = guard
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def do(self, point: Point | None, action: Callable[[], None]) -> None:
        """Run `action` after `point`, also if waiting fails; at once without one. Points come from one thread only."""
        if point is None:
            action()
            return

        def wait() -> None:
            try:
                point.synchronize()
            finally:
                action()

        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="specd-afterwards", daemon=True)
            self._thread.start()
        self._work.put(wait)

    def close(self) -> None:
        """Run all actions, then end."""
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        self._guard(on_device, self._device)
        while (wait := self._work.get()) is not None:
            self._guard(wait)


class Staging:
    """The staging buffers of one subscriber: up to `most`, and more only if none in use is about to come back."""

    def __init__(self, device: str, most: int, afterwards: Afterwards) -> None:
        self._device = device
        self._most = most
        self._afterwards = afterwards
        self._changed = Changed()
        self._free: deque[torch.Tensor] = deque()
        self._count = 0
        self._still_read = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """A free buffer, uint8 [≥ nbytes]; waits for one that the training stream still reads, or allocates it."""
        with self._changed:
            while not self._free and self._count >= self._most and self._still_read:
                self._changed.wait()
            buffer = self._free.popleft() if self._free else None
            self._count += buffer is None
        if buffer is not None and buffer.numel() >= nbytes:
            return buffer
        del buffer  # before there is a larger one
        return allocate(nbytes, self._device)

    def spare(self, nbytes: int, new: bool) -> torch.Tensor | None:
        """A buffer as `take` gives it, or None rather than wait. new: whether it may be allocated."""
        with self._changed:
            fits = bool(self._free) and self._free[0].numel() >= nbytes
            room = bool(self._free) or self._count < self._most
        # What is free stays so meanwhile, because only one thread takes.
        return self.take(nbytes) if fits or (new and room) else None

    def give(self, buffer: torch.Tensor, after: Point | None = None) -> None:
        """Take a buffer back; its bytes may be overwritten once the training stream has come to `after`."""
        with self._changed:
            self._still_read += 1
        self._afterwards.do(after, partial(self._free_again, buffer))

    def forget(self) -> None:
        """Stop counting a buffer that never comes back: a cancelled transfer may still write to it."""
        with self._changed:
            self._count -= 1

    def _free_again(self, buffer: torch.Tensor) -> None:
        with self._changed:
            self._still_read -= 1
            self._free.append(buffer)
            self._changed.notify()
