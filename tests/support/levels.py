"""Device memory before and after: what killed processes and broken sessions leave behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

import torch

SHARED = os.environ.get("SPECD_SHARED_GPU") == "1"
"""Other processes use the devices meanwhile, such as tests beside these: then their level says nothing."""
SETTLE_S = 15.0


class Levels:
    """Memory in use on devices, whoever uses it: cudaMemGetInfo counts every process.

    devices: such as `cuda:0`. slack: bytes that each may have more of in use afterwards.
    """

    def __init__(self, devices: Iterable[str], slack: int) -> None:
        self._devices = sorted(set(devices))
        self._slack = slack
        for device in self._devices:  # this process's own contexts belong to the level
            torch.zeros(1, device=device)
        self.before = self._used()
        limit = time.monotonic() + SETTLE_S
        # The driver frees a dead process's memory a moment after its end: a level with some of it would hide a leak.
        while not SHARED and time.monotonic() < limit:
            time.sleep(0.5)
            before, self.before = self.before, self._used()
            if before == self.before:
                break

    def check(self) -> None:
        """Wait until it is back, and fail if it does not come back."""
        limit = time.monotonic() + SETTLE_S
        while not SHARED and any(now > then + self._slack for now, then in zip(self._used(), self.before, strict=True)):
            assert time.monotonic() < limit, f"device memory: {self.before} bytes before, {self._used()} after"
            time.sleep(0.1)

    def _used(self) -> list[int]:
        facts = [torch.cuda.mem_get_info(device) for device in self._devices]
        return [total - free for free, total in facts]
