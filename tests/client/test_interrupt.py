"""The interrupt: what it calls, and when it does not any more."""

from __future__ import annotations

from specd.client.interrupt import Interrupt


def test_it_calls_what_is_to_be_ended_once_and_only_in_its_block() -> None:
    interrupt, called = Interrupt(), list[str]()
    with interrupt.calling(lambda: called.append("over")):
        pass
    with interrupt.calling(lambda: called.append("one")), interrupt.calling(lambda: called.append("two")):
        interrupt.set()
    assert called == ["one", "two"]
    assert interrupt.wait(0)


def test_what_comes_after_it_was_set_is_called_at_once() -> None:
    interrupt, called = Interrupt(), list[str]()
    interrupt.set()
    with interrupt.calling(lambda: called.append("late")):
        assert called == ["late"]
