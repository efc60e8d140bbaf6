"""The lag window in a ring: what is saved, who reads it, who need not wait any more, and what a full one leaves out."""

from __future__ import annotations

import pytest

from rings import A, B, C, Clock, content, fill_all
from specd.daemon.lag import LagWindow, Save
from specd.daemon.ring import Ring
from specd.daemon.slots import SlotState
from specd.protocol.capture import CaptureSpec

SPEC = CaptureSpec(taps=(1,))
MORE = CaptureSpec(taps=(1, 2))


class Bench:
    """A ring of runs that share, with a lag window, and its worker. A leads. eager: all that is kept is saved."""

    def __init__(
        self, cells: int, num_slots: int = 4, names: tuple[bytes, ...] = (A, B), *, eager: bool = True
    ) -> None:
        self.clock = Clock()
        self.ring = Ring(num_slots, len(names), 1000.0, self.clock, 1.0)
        self.ring.contents.lag = self.lag = LagWindow(cells)
        if eager:
            self.ring.contents.spare = num_slots
        self.seq = 0
        for name in names:
            self.ring.open(name, num_slots, spec=SPEC, share="s")

    def save(self, ok: bool = True) -> list[Save]:
        """Have saved what can be; returns what was."""
        saves = self.ring.contents.saves()
        for save in saves:
            self.lag.saved(save.number, ok)
        return saves

    def read(self, name: bytes, place: int, want: CaptureSpec = SPEC) -> str:
        """A run reads a batch and is done with it; returns its source, empty if the run is held."""
        self.seq += 1
        self.ring.submit(name, self.seq, content(place), want, place=place)
        leases = [lease for lease in fill_all(self.ring) if lease.holder == name]
        for lease in leases:
            assert self.ring.release(name, lease.id)
        return leases[0].source if leases else ""

    def lead(self, *places: int) -> None:
        """A reads batches, each of which is saved if it can be."""
        for place in places:
            assert self.read(A, place) == "forward"
            self.save()

    @property
    def cells(self) -> dict[int, int]:
        """Places of what lies in the window, and for how many it is."""
        return {copy.place: len(copy.owed) for copy in self.lag.copies}


def test_who_lags_reads_what_was_saved_and_the_leader_never_waits() -> None:
    bench = Bench(cells=20)
    bench.lead(*range(12))
    assert bench.ring.counters["held_ms"] == 0
    assert not bench.ring.shares.dues()
    assert not bench.ring.behind(B)
    assert [bench.read(B, place) for place in range(12)].count("forward") == 0
    counters = bench.ring.counters
    assert (counters["fills"], counters["lag_hits"] + counters["kept_hits"], counters["kept_evicted"]) == (12, 12, 0)
    assert (bench.lag.used, bench.ring.counts()["free"]) == (0, 4), "nobody is owed anything any more"


def test_what_the_ring_has_room_for_is_not_copied() -> None:
    bench = Bench(cells=20, num_slots=12, eager=False)
    for place in range(9):
        bench.lead(place)
        assert bench.lag.used == 0
    bench.lead(9, 10, 11, 12)
    assert set(bench.cells) == {9, 10, 11, 12}, "so that 3 slots can be filled at once"
    assert [bench.read(B, place) for place in range(13)] == ["kept"] * 13
    assert (bench.ring.counters["fills"], bench.ring.counters["lag_saves"]) == (13, 4)


def test_what_is_not_saved_yet_or_not_whole_is_computed() -> None:
    bench = Bench(cells=4, num_slots=2)
    assert bench.read(A, 0) == "forward"
    (pending,) = bench.ring.contents.saves()
    assert bench.read(A, 1) == "forward"
    bench.save(ok=False)
    slots = bench.ring.contents.slots
    for index, slot in enumerate(slots):
        if slot.state is SlotState.KEPT:
            bench.ring.contents.vacate(index)  # as for a stranger
    assert bench.read(B, 0) == "forward"
    assert bench.read(B, 1) == "forward"
    bench.lag.saved(pending.number, True)
    assert bench.lag.used == 0, "B has had it"


def test_reading_a_cell_is_no_forward_that_the_leader_would_wait_for() -> None:
    bench = Bench(cells=20)
    bench.lead(*range(8))
    bench.ring.submit(B, 900, content(4), SPEC, place=4)
    (grant,) = bench.ring.schedule().fills
    assert grant.cell is not None
    bench.ring.submit(A, 901, content(8), SPEC, place=8)
    assert [each.cell for each in bench.ring.schedule().fills] == [None]


def test_who_reads_a_cell_is_not_held_for_a_slot() -> None:
    bench = Bench(cells=1, num_slots=3, names=(A, B, C))
    bench.lead(0, 1, 2)
    assert bench.cells == {0: 2}
    assert bench.read(A, 3) == "forward", "the slot of 0 is safe"
    assert bench.read(A, 4) == "", "1, 2 and 3 would be lost"
    assert bench.ring.shares.dues()
    bench.ring.submit(B, 900, content(0), SPEC, place=0)
    assert [fill.cell for fill in bench.ring.schedule().fills] == [0], "though C waits for all that is in the ring"


def test_a_full_window_keeps_the_oldest_and_takes_the_next_once_a_cell_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(cells=2, num_slots=6)
    bench.lead(0, 1, 2, 3)
    assert bench.cells == {0: 1, 1: 1}
    with monkeypatch.context() as patch:
        patch.setattr(bench.lag, "save", lambda *slot: pytest.fail("it is looked for again and again"))
        assert bench.ring.contents.saves() == []
    assert bench.read(B, 0) == "kept"
    assert bench.cells == {1: 1}
    bench.save()
    assert bench.cells == {1: 1, 2: 1}


def test_of_two_that_lag_the_nearer_one_has_the_cells() -> None:
    bench = Bench(cells=2, num_slots=8, names=(A, B, C))
    bench.read(B, 1000)
    bench.lead(1100, 1101)  # for B and for C, which is at 0
    assert bench.cells == {1100: 2, 1101: 2}, "B comes to 1101 sooner than C to 1000"
    assert [bench.read(B, place) for place in (1100, 1101)] == ["kept", "kept"]
    assert bench.cells == {1100: 1, 1101: 1}, "C is still to come"
    bench.lead(1102)
    assert set(bench.cells) == {1000, 1102}, "1000 is what C needs first, and B needs 1102 before that"
    bench.ring.close(B)
    assert bench.cells == {1000: 2, 1102: 1}
    bench.ring.close(C)
    assert bench.cells == {1000: 1}, "A has come past it, and it makes room for anything"


def test_what_all_have_come_past_makes_room_first() -> None:
    bench = Bench(cells=2, num_slots=8)
    bench.lead(0, 1)
    bench.read(B, 5, MORE)  # it trains on other batches
    bench.lead(6)
    assert bench.cells == {1: 1, 6: 1}


def test_a_late_answer_of_a_save_that_was_given_up_changes_nothing() -> None:
    bench = Bench(cells=1, num_slots=8, names=(A, B, C))
    bench.read(B, 100)
    bench.read(A, 200)
    (first,) = bench.ring.contents.saves()
    bench.read(B, 200)
    bench.read(A, 201)
    (second,) = bench.ring.contents.saves()
    assert (second.cell, second.number) == (first.cell, first.number + 1), "C, who is far, gave it up"
    bench.lag.saved(first.number, True)
    assert not [copy for copy in bench.lag.copies if copy.saved]
    bench.lag.saved(second.number, True)
    assert [copy.place for copy in bench.lag.copies if copy.saved] == [201]


def test_a_run_without_a_share_reads_what_covers_its_own_and_nothing_else() -> None:
    bench = Bench(cells=20, num_slots=5, names=(A, B, C))
    bench.ring.open(C, 3, spec=SPEC)
    bench.lead(*range(6))
    (copy,) = [copy for copy in bench.lag.copies if copy.place == 5]
    bench.ring.contents.vacate(next(i for i, s in enumerate(bench.ring.contents.slots) if s.batch_id == copy.batch_id))
    assert bench.read(C, 5) == "kept"
    assert bench.read(C, 4, MORE) == "forward"
    assert bench.lag.used == 6, "it pays nobody's"


def test_a_dead_worker_s_cells_are_gone() -> None:
    bench = Bench(cells=5)
    bench.lead(0, 1)
    bench.ring.reset()
    assert bench.ring.contents.lag.cells == 0
    assert repr(bench.lag) == "LagWindow(0 of 5 cells)"
