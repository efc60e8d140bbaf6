"""A device kept busy with matmuls, as a target keeps it, to measure how much transfers slow them."""

from __future__ import annotations

import collections
import threading
from typing import Any, Final

from specd.errors import TransportError
from specd.memory import cuda

MATMUL: Final = 8192
"""Rows and columns of the load's square matrices."""
QUEUED: Final = 16
"""Matmuls the load keeps ahead of the device: some 25 ms of an H200, so that it never waits for this process."""


class MatmulLoad:
    """A stream of bfloat16 matmuls of 8192 × 8192 on one device; takes 0.4 GiB.

    Runs from construction on. Raises TransportError when it cannot.
    """

    def __init__(self, device: str) -> None:
        cuda.ordinal(device)
        self._device = cuda.resolve(device)
        self._ending = threading.Event()
        self._running = threading.Event()
        self._rate = 0.0
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="specd-load", daemon=True)
        self._thread.start()
        self._running.wait()
        if self._problem:
            self.stop()

    def stop(self) -> float:
        """End it; returns its TFLOP/s between construction and now. Raises TransportError when it broke."""
        self._ending.set()
        self._thread.join()
        if self._problem:
            raise TransportError(f"the load on {self._device} failed: {self._problem}")
        return self._rate

    def _run(self) -> None:
        try:
            self._multiply()
        except RuntimeError as error:  # no memory, or a fault of the device
            self._problem = str(error)
        finally:
            self._running.set()

    def _multiply(self) -> None:
        import torch

        make_stream: Any = torch.cuda.Stream  # untyped
        make_event: Any = torch.cuda.Event
        torch.cuda.set_device(self._device)
        with torch.cuda.stream(make_stream(self._device)):
            left, right = (torch.randn(MATMUL, MATMUL, device=self._device, dtype=torch.bfloat16) for _ in range(2))
            out = torch.empty_like(left)
            ahead: collections.deque[Any] = collections.deque()

            def queue() -> None:
                torch.mm(left, right, out=out)
                # Blocking, so that a wait costs no CPU seconds that a benchmark would charge to the transport.
                ahead.append(make_event(enable_timing=True, blocking=True))
                ahead[-1].record()

            for _ in range(QUEUED):  # the first ones choose kernels
                queue()
            first = last = ahead.popleft()
            while len(ahead) > 1:
                first = last = ahead.popleft()
            first.synchronize()
            self._running.set()
            done = 0
            while done == 0 or not self._ending.is_set():
                while len(ahead) < QUEUED:
                    queue()
                last = ahead.popleft()
                last.synchronize()
                done += 1
            self._rate = done * 2 * MATMUL**3 / (first.elapsed_time(last) / 1e3) / 1e12
            ahead[-1].synchronize()  # nothing may still use the matrices when they are freed
