"""Whole numbers on the host, and from there to the device without waiting for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """`array` on `device`; from pinned memory and without waiting for the device if that is a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
