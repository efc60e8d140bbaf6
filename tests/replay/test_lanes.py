"""The lanes: what is kept is read again, the same bytes or none, and nobody waits for a disk that fails or is slow."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_cuda
from specd.memory.arena import PAGE, HostArena
from specd.memory.device_arena import DeviceArena
from specd.replay import files, lanes, pinned
from specd.replay.files import Files, StoreDirectory
from specd.replay.form import Identity, offset
from specd.replay.lanes import WRITE_BUFFERS, Lanes, Task
from specd.replay.pinned import Pinned

SLOTS = 8
SLOT = 3 * PAGE
NBYTES = 2 * PAGE + 100
IDENTITY = Identity(model="tiny", fingerprint="f", backend="b", torch="t", device="cpu", exact=True)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def states(number: int) -> bytes:
    return np.random.default_rng(number).bytes(NBYTES)


class Rig:
    """A ring on a device, its lanes, and what these say."""

    def __init__(self, directory: Path, device: str = "cpu", *, ram: int = 0, disk: int = 0) -> None:
        self.directory = directory
        self.arena: HostArena | DeviceArena = (
            HostArena.create(SLOTS, SLOT, None)
            if device == "cpu"
            else DeviceArena.create(SLOTS, SLOT, device, None, mirrored=False)
        )
        self.place = StoreDirectory(directory, offset(disk, SLOT), os.getpid()) if disk else None
        cells: list[Files | Pinned] = [Pinned(ram, self.arena)] if ram else []
        if self.place is not None:
            cells.append(Files.open(self.place, SLOT, IDENTITY))
        self.filled: list[Task] = []
        self.missed: list[Task] = []
        self.crashes: list[str] = []
        self.changed = threading.Condition()
        self.lanes = Lanes(
            self.arena,
            cells,
            filled=self.noting(self.filled),
            missed=self.noting(self.missed),
            counted=self.noting(None),
            crashed=self.noting(self.crashes),
        )
        self.generation = 0

    def noting(self, noted: list[Any] | None) -> Callable[..., None]:
        def note(*what: Any) -> None:
            with self.changed:
                if noted is not None:
                    noted.extend(what)
                self.changed.notify_all()

        return note

    def until(self, there: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(there, 30), self.lanes.counters

    def start(self) -> Rig:
        self.lanes.start()
        assert self.lanes.scanned.wait(30)
        return self

    def task(self, number: int, slot: int = 0, *, keep: bool = True) -> Task:
        self.generation += 1
        return Task(key(number), slot, self.generation, NBYTES, 10, keep)

    def compute(self, number: int, slot: int = 0, *, keep: bool = True) -> None:
        """A batch that was computed is announced."""
        task = self.task(number, slot, keep=keep)
        self.arena.begin(slot)
        self.arena.write(slot, np.frombuffer(bytearray(states(number)), np.uint8))
        self.arena.seal(slot, task.generation, NBYTES)
        self.lanes.offer(task)

    def keep(self, *numbers: int) -> None:
        """Batches are computed, and kept, one by one."""
        for done, number in enumerate(numbers, self.count("wrote") + 1):
            self.compute(number)
            self.until(partial(self._wrote, done))

    def _wrote(self, number: int) -> bool:
        return self.count("wrote") == number

    def replay(self, number: int, slot: int = 1) -> bytes | None:
        """The bytes that are found in a slot once it is read from what was kept; None if it has to be computed."""
        task, before = self.task(number, slot), len(self.filled) + len(self.missed)
        if not self.lanes.take(task):
            return None
        self.until(lambda: len(self.filled) + len(self.missed) > before)
        if task in self.missed:
            assert self.arena.generation(slot) != task.generation
            return None
        assert self.arena.generation(slot) == task.generation
        return bytes(self.arena.tensor(slot)[:NBYTES].numpy())

    def count(self, name: str) -> int:
        return self.lanes.counters[name]

    def counts(self, **expected: int) -> bool:
        """Whether these are the counts, and all others 0, now or as soon as the last thread has said so."""
        self.until(lambda: {name: count for name, count in self.lanes.counters.values().items() if count} == expected)
        return True

    def close(self) -> None:
        self.lanes.close()
        self.arena.close()
        if self.place is not None:
            self.place.close()


Make = Callable[..., Rig]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    fake_cuda.install(monkeypatch)
    made: list[Rig] = []

    def build(device: str = "cpu", *, ram: int = 0, disk: int = 0) -> Rig:
        made.append(Rig(tmp_path / "store", device, ram=ram, disk=disk))
        return made[-1]

    yield build
    for rig in made:
        rig.close()
        rig.close()
    assert not fake_cuda.registered


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("sizes", [{"ram": 3}, {"disk": 3}, {"ram": 1, "disk": 2}], ids=str)
def test_a_fixed_part_is_kept_and_read_again(device: str, sizes: dict[str, int], make: Make) -> None:
    rig = make(device, **sizes).start()
    rig.keep(0, 1, 2)
    for number in (3, 4, 0):
        rig.compute(number)
    assert rig.lanes.used == 3
    assert [rig.replay(number) for number in (2, 0, 1)] == [states(number) for number in (2, 0, 1)]
    assert [rig.replay(number) for number in (3, 4)] == [None, None]
    assert rig.counts(wrote=3, hit=3, miss=2)


def test_the_next_worker_finds_what_lies_on_the_disk_and_memory_takes_what_is_new(make: Make) -> None:
    first = make(disk=2).start()
    first.keep(0, 1)
    first.close()
    rig = make(ram=2, disk=2).start()
    assert rig.lanes.used == 2
    rig.keep(2, 3)
    rig.compute(0)
    assert [rig.replay(number) for number in range(4)] == [states(number) for number in range(4)]
    assert rig.lanes.used == 4


def test_many_at_once_are_all_right(make: Make) -> None:
    rig = make(ram=3, disk=5).start()
    rig.keep(*range(8))
    tasks = [rig.task(number, number) for number in range(SLOTS)]
    assert all(rig.lanes.take(task) for task in tasks)
    rig.until(lambda: len(rig.filled) == SLOTS)
    assert [bytes(rig.arena.tensor(slot)[:NBYTES].numpy()) for slot in range(SLOTS)] == list(map(states, range(8)))


@pytest.mark.parametrize("sizes", [{"ram": 3}, {"disk": 3}], ids=str)
def test_a_slot_that_is_refilled_meanwhile_is_not_kept(
    sizes: dict[str, int], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, copy = make(**sizes).start(), pinned._copy

    def refilled(into: memoryview, source: memoryview) -> None:
        copy(into, source)
        rig.arena.begin(0)

    with monkeypatch.context() as patch:
        patch.setattr(pinned, "_copy", refilled)
        rig.compute(0)
        assert rig.counts(skipped=1)
    assert rig.lanes.used == 0
    rig.keep(0)
    assert rig.replay(0) == states(0)


def test_a_slow_disk_keeps_nobody_waiting(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, write, go = make(disk=SLOTS), os.pwritev, threading.Event()

    def slow(*arguments: Any) -> int:
        assert go.wait(30)
        return write(*arguments)

    monkeypatch.setattr(os, "pwritev", slow)
    rig.start()
    for number in range(WRITE_BUFFERS + 3):
        rig.compute(number, slot=number)
    assert not rig.count("skipped"), "more than there are buffers: the rest lies in the ring"
    for slot in (WRITE_BUFFERS, WRITE_BUFFERS + 1):
        rig.arena.begin(slot)
    go.set()
    rig.until(lambda: rig.count("wrote") == WRITE_BUFFERS + 1)
    assert rig.counts(wrote=WRITE_BUFFERS + 1, skipped=2), "those that were refilled meanwhile"
    kept = [*range(WRITE_BUFFERS), WRITE_BUFFERS + 2]
    assert [rig.replay(number) for number in kept] == list(map(states, kept))
    rig.keep(WRITE_BUFFERS)


def test_what_another_daemon_keeps_is_neither_kept_nor_missed(make: Make) -> None:
    rig = make(ram=2).start()
    rig.compute(0, keep=False)
    assert not rig.lanes.take(rig.task(0, keep=False))
    rig.keep(1)
    assert rig.lanes.take(rig.task(1, 2, keep=False))
    assert rig.counts(wrote=1, hit=1)


def test_what_is_larger_than_a_cell_is_not_kept_and_said_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    rig = make(ram=1, disk=1).start()
    for number in (1, 2):
        rig.lanes.offer(rig.task(number)._replace(nbytes=SLOT + 1))
    assert rig.counts(skipped=2)
    assert caplog.text.count("a batch of 10 tokens takes 12,289 bytes and a cell has 12,288") == 1
    rig.keep(3, 4)


def test_a_damaged_batch_is_computed_and_kept_again(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    rig = make(disk=2).start()
    rig.keep(0, 1)
    with (rig.directory / files.NAME).open("r+b") as file:
        file.seek(offset(1, SLOT) + PAGE + 77)
        before = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([before[0] ^ 4]))
    assert rig.replay(1) is None
    assert rig.replay(0) == states(0)
    assert rig.counts(wrote=2, damaged=1, miss=1, hit=1)
    assert "the batch of cell 1 is damaged; it is computed again" in caplog.text
    rig.keep(1)
    assert rig.replay(1) == states(1)


def broken(*_: Any) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_disk_that_fails_three_times_in_a_row_is_switched_off(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make(disk=SLOTS).start()
    rig.keep(*range(6))
    for number in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", broken)
            assert rig.replay(number) is None
    assert rig.replay(2) == states(2), "two errors are none"
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        assert [rig.replay(number) for number in (3, 4)] == [None, None]
        patch.setattr(os, "pwritev", broken)
        rig.compute(7)
        rig.until(lambda: rig.count("skipped") == 1)
    assert "switched off after 3 errors in a row: [Errno 5] Input/output error" in caplog.text
    assert rig.lanes.failed == "3 errors in a row: Input/output error"
    assert [rig.replay(number) for number in (2, 5)] == [None, None]
    rig.compute(9)
    assert rig.counts(wrote=6, hit=1, miss=6, skipped=1)
    assert rig.lanes.used == 0


def test_what_a_disk_does_not_answer_is_computed_and_what_still_comes_goes_nowhere(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig, read, go = make(ram=1, disk=SLOTS), os.preadv, threading.Event()
    monkeypatch.setattr(lanes, "STALL_S", 0.2)
    rig.start()
    rig.keep(*range(SLOTS))

    def hangs(*arguments: Any) -> int:
        assert go.wait(30)
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", hangs)
    tasks = [rig.task(number, number) for number in range(1, SLOTS)]
    assert all(rig.lanes.take(task) for task in tasks)
    rig.until(lambda: len(rig.missed) == len(tasks))
    assert "switched off: its disk has not answered for 0 s" in caplog.text
    assert rig.lanes.failed == "it has not answered for 0 s"
    assert rig.replay(0) is None, "nor from memory, whose readers wait with it"
    for task in tasks:
        rig.arena.begin(task.slot)
        rig.arena.seal(task.slot, 1000 + task.slot)
    go.set()
    rig.lanes.close()
    assert [rig.arena.generation(task.slot) for task in tasks] == [1000 + task.slot for task in tasks]
    assert not rig.filled
    assert rig.count("miss") == SLOTS


def test_nothing_is_found_or_kept_while_the_disk_is_looked_through(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(disk=2).start()
    first.keep(0)
    first.close()
    read, go = os.preadv, threading.Event()

    def slow(*arguments: Any) -> int:
        assert go.wait(30)
        return read(*arguments)

    rig = make(ram=1, disk=2)
    monkeypatch.setattr(os, "preadv", slow)
    rig.lanes.start()
    assert rig.replay(0) is None
    rig.keep(1)
    rig.compute(2)
    assert rig.counts(miss=1, wrote=1)
    go.set()
    assert rig.lanes.scanned.wait(30)
    assert [rig.replay(number) for number in (0, 1, 2)] == [states(0), states(1), None]


def test_a_disk_that_cannot_be_looked_through_is_not_used(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make(disk=2)
    monkeypatch.setattr(os, "preadv", broken)
    rig.start()
    rig.compute(0)
    assert rig.replay(0) is None
    assert "cannot be read, so it is not used" in caplog.text
    assert rig.counts(miss=1)


def test_a_fault_of_its_own_is_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make(ram=2).start()
    monkeypatch.setattr(pinned, "_copy", lambda into, source: 1 / 0)
    rig.compute(0)
    rig.until(lambda: rig.crashes == ["the replay tier failed"])


def test_old_batches_make_room_once_nobody_asks_for_them(make: Make) -> None:
    rig = make(ram=2).start()
    rig.lanes.lasts(4)
    rig.keep(0, 1)
    for number in range(10, 13):
        assert rig.replay(number) is None
    rig.compute(12)
    assert rig.lanes.used == 2
    for number in range(13, 16):
        assert rig.replay(number) is None
    rig.keep(14)
    assert rig.replay(14) == states(14)
    assert rig.replay(0) is None
