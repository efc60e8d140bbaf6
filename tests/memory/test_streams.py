"""Points of a stream's work, and buffers: what they are without a device, and with one."""

from __future__ import annotations

import pytest
import torch

from specd.memory.streams import allocate, on_device, reached
from specd.protocol.batch import ALIGNMENT


@pytest.mark.parametrize("nbytes", [1, ALIGNMENT, ALIGNMENT + 1])
def test_a_buffer_is_aligned_and_has_whole_pages(nbytes: int) -> None:
    buffer = allocate(nbytes, "cpu")
    assert (buffer.dtype, buffer.dim(), buffer.device.type) == (torch.uint8, 1, "cpu")
    assert buffer.data_ptr() % ALIGNMENT == 0
    assert buffer.numel() % ALIGNMENT == 0
    assert 0 <= buffer.numel() - nbytes < ALIGNMENT


def test_the_cpu_has_no_streams() -> None:
    on_device("cpu")
    assert reached("cpu") is None


@pytest.mark.gpu(1)
def test_a_point_is_reached_when_the_work_before_it_is_done() -> None:
    on_device("cuda:0")
    value = allocate(64 << 20, "cuda:0")
    for _ in range(100):
        value.add_(1)
    point = reached("cuda:0")
    assert point is not None
    point.synchronize()
    assert torch.cuda.current_stream("cuda:0").query()
