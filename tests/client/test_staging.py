"""Staging buffers: how many there are, and when one may be written again."""

from __future__ import annotations

import threading

import pytest

from scripted import Work
from specd.client.guard import Guard
from specd.client.staging import Afterwards, Staging
from specd.errors import DaemonError
from specd.memory.streams import allocate


def test_staging_never_has_more_than_it_may_unless_nothing_would_come_back() -> None:
    afterwards = Afterwards("cpu", Guard(threading.Condition()))
    staging = Staging("cpu", 2, afterwards)
    one, two = staging.take(100), staging.take(100)
    assert one.data_ptr() != two.data_ptr()
    assert one.data_ptr() % 4096 == 0
    three = staging.take(100)
    assert three.data_ptr() not in (one.data_ptr(), two.data_ptr()), "nobody gives one back: waiting would be for ever"
    staging.give(one)
    larger = staging.take(one.numel() + 1)
    assert larger.numel() > one.numel()
    staging.give(two)
    assert staging.take(50).data_ptr() == two.data_ptr()
    afterwards.close()


def test_a_point_that_fails_gives_its_buffer_back_and_is_reported() -> None:
    guard = Guard(threading.Condition())
    afterwards = Afterwards("cpu", guard)
    staging = Staging("cpu", 1, afterwards)
    buffer = staging.take(100)
    broken = Work(RuntimeError("device-side assert"))
    staging.give(buffer, broken)
    broken.end()
    assert staging.take(100).data_ptr() == buffer.data_ptr()
    afterwards.close()
    with pytest.raises(DaemonError, match="device-side assert"):
        guard.check()


def test_a_buffer_left_to_a_lost_transfer_is_replaced() -> None:
    afterwards = Afterwards("cpu", Guard(threading.Condition()))
    staging = Staging("cpu", 1, afterwards)
    lost = staging.take(100)
    staging.forget()
    assert staging.take(100).data_ptr() != lost.data_ptr()
    afterwards.close()


def test_buffers_are_whole_pages() -> None:
    assert allocate(4097, "cpu").numel() == 8192
    assert allocate(1, "cpu").data_ptr() % 4096 == 0
