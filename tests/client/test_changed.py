"""The condition of a subscriber: Ctrl-C at any moment leaves its lock to the other threads."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

import pytest

from specd.client.changed import Changed


def interrupted(changed: threading.Condition, moment: int) -> bool:
    """Enter and leave, with an interrupt at one of the moments at which Python looks for signals; whether it came."""
    left = moment

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        left -= event in ("call", "c_return")  # a function of Python's begins, or one of C has ended
        if left < 0:
            raise KeyboardInterrupt

    sys.setprofile(count)
    try:
        with changed:
            pass
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


def kept_at(changed: threading.Condition) -> list[int]:
    """The moments at which an interrupt leaves the lock held."""
    kept = []
    for moment in range(20):
        if not interrupted(changed, moment):
            break
        try:
            changed.release()
        except RuntimeError:  # nobody has it
            continue
        kept.append(moment)
    return kept


def test_an_interrupt_at_any_moment_lets_go_of_the_lock() -> None:
    assert kept_at(Changed()) == []


def test_those_of_threading_would_keep_it() -> None:
    assert kept_at(threading.Condition()) != []


def test_it_waits_and_is_notified() -> None:
    changed, arrived = Changed(), []

    def arrive() -> None:
        with changed:
            arrived.append(1)
            changed.notify_all()

    with changed, changed:  # as often as wanted by one thread
        thread = threading.Thread(target=arrive)
        thread.start()
        assert changed.wait_for(lambda: bool(arrived), 20)
    thread.join(20)
    with pytest.raises(RuntimeError):
        changed.notify()
