"""What slots hold: the newest kept one goes first, and what nobody waits for before all."""

from __future__ import annotations

from rings import A, B, C, Clock, content
from specd.daemon.contents import Contents
from specd.daemon.ring import COUNTERS
from specd.daemon.shares import Run, Shares
from specd.daemon.slots import Ask, SlotState
from specd.protocol.capture import CaptureSpec

SPEC = CaptureSpec(taps=(1,))


def made(pace_s: float) -> tuple[Contents, Run, Run, Run, dict[str, int]]:
    counters: dict[str, int] = dict.fromkeys(COUNTERS, 0)
    shares = Shares(Clock(), pace_s)
    runs = [shares.enter(name, b"", share, SPEC) for name, share in ((A, "s"), (B, "s"), (C, ""))]
    return Contents(3, shares, counters), runs[0], runs[1], runs[2], counters


def keep(contents: Contents, run: Run, place: int) -> int:
    """Have a slot filled and read by a run."""
    index = contents.fill(run, Ask(place, content(place), SPEC, place))
    assert index is not None
    contents.slots[index].state = SlotState.READY
    contents.settle(index)
    return index


def held(contents: Contents) -> list[bytes]:
    return sorted(slot.batch_id for slot in contents.slots)


def test_the_newest_is_taken_first() -> None:
    contents, one, two, _, counters = made(pace_s=0.0)
    for place in range(5):
        keep(contents, one, place)
    assert held(contents) == [content(0), content(1), content(4)], "who follows needs the newest last"
    assert two.behind
    assert counters["kept_evicted"] == 2


def test_what_nobody_waits_for_is_taken_before_what_a_member_does() -> None:
    contents, one, two, stranger, _ = made(pace_s=9.0)
    keep(contents, two, 7)
    keep(contents, one, 8)
    keep(contents, one, 9)
    assert contents.fill(one, Ask(1, content(10), SPEC, 10)) == 0, "it alone is owed the first"
    assert contents.fill(one, Ask(2, content(11), SPEC, 11)) is None, "it waits for the other"
    assert contents.fill(stranger, Ask(3, content(12), SPEC)) == 2, "a stranger does not"
    assert not two.behind


def test_content_is_found_until_its_slot_is_taken() -> None:
    contents, one, _, stranger, _ = made(pace_s=0.0)
    keep(contents, one, 1)
    ask = Ask(1, content(1), SPEC)
    index = contents.find(ask)
    assert index is not None
    assert contents.join(index, stranger) == "kept"
    assert contents.find(Ask(2, content(1), CaptureSpec(taps=(2,)))) is None
    contents.slots[index].owed.clear()
    contents.settle(index)
    assert contents.find(ask) is None
