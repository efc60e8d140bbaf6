"""Cells of a store: a random walk against what must always hold, and what is kept and what is given away."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specd.replay.store import Entry, State, Store


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def put(store: Store, number: int) -> Entry | None:
    entry = store.claim(key(number))
    if entry is not None:
        store.stored(entry)
    return entry


def epoch(store: Store, numbers: list[int], seed: int) -> int:
    """Ask for all, in an order of its own, and keep what is not there; how many were."""
    hits = 0
    for number in random.Random(seed).sample(numbers, len(numbers)):
        store.turn()
        if (entry := store.look(key(number))) is not None:
            hits += 1
            store.done(entry)
        else:
            put(store, number)
    return hits


@pytest.mark.parametrize("cells", [0, 10, 35, 40, 60])
def test_every_epoch_finds_the_part_that_fits(cells: int) -> None:
    store, batches = Store(cells), list(range(40))
    store.horizon = 2 * len(batches)
    assert [epoch(store, batches, seed) for seed in range(4)] == [0] + [min(cells, 40)] * 3


def test_batches_of_an_earlier_run_make_room_only_once_nobody_asked_for_them_long_enough() -> None:
    store, old, new = Store(30), list(range(30)), list(range(100, 130))
    store.horizon = 60
    epoch(store, old, 0)
    assert epoch(store, new, 1) == 0
    assert all(key(number) in store for number in old), "they may come back"
    epoch(store, new, 2)
    epoch(store, new, 3)
    assert [epoch(store, new, seed) for seed in (4, 5)] == [30, 30], "each gave its cell away"
    assert epoch(store, old, 6) == 0


def test_two_runs_that_both_go_on_keep_their_own() -> None:
    store = Store(30)
    store.horizon = 2 * 60
    for seed in range(5):
        found = epoch(store, list(range(40)), seed) + epoch(store, list(range(100, 120)), seed)
        assert found == (30 if seed else 0)


def test_the_cell_of_a_reader_is_nobody_elses() -> None:
    store = Store(1)
    store.horizon = 0
    put(store, 1)
    first, second = store.look(key(1)), store.look(key(1))
    assert first is not None
    assert first is second
    store.drop(first)
    store.drop(first)
    for _ in range(9):
        store.turn()
    assert store.look(key(1)) is None
    assert store.claim(key(2)) is None, "it is read still"
    store.done(first)
    assert store.claim(key(2)) is None
    store.done(first)
    assert put(store, 2) is not None


def test_a_damaged_batch_is_written_over_its_own_remains() -> None:
    store = Store(5)
    for number in range(3):
        put(store, number)
    entry = store.look(key(1))
    assert entry is not None
    store.drop(entry)
    store.done(entry)
    again = put(store, 1)
    assert again is not None
    assert again.cell == entry.cell


def test_what_lay_there_before_is_found_once() -> None:
    store = Store(4)
    store.load({0: key(7), 2: key(8), 3: key(7)})
    assert store.used == 2
    assert key(8) in store
    assert {put(store, number).cell for number in (1, 2)} == {1, 3}  # type: ignore[union-attr]
    assert put(store, 3) is None


class Model:
    """What must hold, kept beside a store: who has which cell."""

    def __init__(self, cells: int, horizon: int) -> None:
        self.store = Store(cells)
        self.store.horizon = horizon
        self.held: list[Entry] = []
        self.writing: list[Entry] = []
        self.seen: dict[bytes, int] = {}
        self.lookups = 0

    def look(self, wanted: bytes) -> None:
        self.store.turn()
        self.lookups += 1
        entry = self.store.look(wanted)
        assert (entry is not None) == (wanted in self.seen)
        if entry is not None:
            assert entry.key == wanted
            self.held.append(entry)
            self.seen[wanted] = self.lookups

    def claim(self, wanted: bytes) -> None:
        before = dict(self.seen)
        entry = self.store.claim(wanted)
        gone = [each for each in before if each not in self.store]
        assert len(gone) <= 1
        for each in gone:
            assert self.lookups - before[each] > self.store.horizon, "a live batch is never evicted"
            del self.seen[each]
        if entry is not None:
            assert wanted not in before
            self.writing.append(entry)

    def check(self) -> None:
        store = self.store
        busy = [entry.cell for entry in self.writing]
        assert len(set(busy)) == len(busy), "two writers of a cell"
        assert not set(busy) & {entry.cell for entry in self.held}, "a cell is written under its reader"
        assert store.used == len(self.seen)
        taken = {*busy, *(entry.cell for entry in self.held)}
        assert store.used + len(busy) <= store.cells
        assert all(0 <= cell < store.cells for cell in taken)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(0, 12))
def test_a_random_walk(seed: int, cells: int, horizon: int) -> None:
    rng, model = random.Random(seed), Model(cells, horizon)
    for _ in range(120):
        wanted = key(rng.randrange(8))
        match rng.choice(["look", "claim", "claim", "stored", "stored", "abandon", "done", "done", "drop"]):
            case "look":
                model.look(wanted)
            case "claim":
                model.claim(wanted)
            case "stored" if model.writing:
                entry = model.writing.pop(rng.randrange(len(model.writing)))
                model.store.stored(entry)
                model.seen[entry.key] = entry.seen
            case "abandon" if model.writing:
                model.store.abandon(model.writing.pop(rng.randrange(len(model.writing))))
            case "done" if model.held:
                model.store.done(model.held.pop(rng.randrange(len(model.held))))
            case "drop" if model.held:
                entry = rng.choice(model.held)
                if entry.state is State.STORED:
                    del model.seen[entry.key]
                model.store.drop(entry)
        model.check()
    while model.held:
        model.store.done(model.held.pop())
    for entry in model.writing:
        model.store.abandon(entry)
    store, free = model.store, model.store.cells - model.store.used
    assert sum(store.claim(key(100 + number)) is not None for number in range(free + 3)) >= free, "a cell was lost"
