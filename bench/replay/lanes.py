"""How fast does each tier keep slots of a ring and read them back, next to the same bytes without it?"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import torch

from specd.memory.arena import HostArena
from specd.memory.cuda import Copier
from specd.memory.device_arena import DeviceArena
from specd.replay.files import GB, NAME, Files, StoreDirectory
from specd.replay.form import Identity, offset
from specd.replay.lanes import READERS, WRITE_BUFFERS, Lanes, Task
from specd.replay.pinned import Pinned, cells_in

SLOTS: Final = 12
IDENTITY: Final = Identity(model="bench", fingerprint="bench", backend="none", torch="none", device="any", exact=True)


Raw = Callable[[], tuple[float, float]]
"""GB/s of the same bytes, written and read without lanes."""


class LaneRow(msgspec.Struct, frozen=True, kw_only=True):
    """One tier; all rates in GB/s, 10⁹ bytes. slots: how many were kept.

    write: as fast as it takes slots. skipped: share of them that it left out when they came at `asked`. read: all of
    them, in another order; read_ms: of one, from being asked for, the median. raw_write, raw_read: of the same bytes
    without lanes, checksums or bounces: to and from the disk by one and by READERS threads, or between ring and memory.
    """

    tier: str
    slots: int
    write: float
    asked: float
    skipped: float
    read: float
    read_ms: float
    raw_write: float
    raw_read: float
    direct: bool


def rows(
    device: str,
    directory: Path | None,
    *,
    slot_bytes: int,
    disk: int,
    memory: int,
    asked: float,
    progress: Callable[[str], None] = lambda line: None,
) -> Iterator[LaneRow]:
    """Measure each tier that has a budget. disk, memory: bytes of it. asked: GB/s. Raises as a daemon's start does."""
    arena: HostArena | DeviceArena = (
        HostArena.create(SLOTS, slot_bytes, None)
        if device == "cpu"
        else DeviceArena.create(SLOTS, slot_bytes, device, None, mirrored=False)
    )
    with contextlib.closing(arena):
        for slot in range(SLOTS):
            arena.tensor(slot).random_()
        if memory:
            progress("memory")
            cells = Pinned(cells_in(memory, arena.stride), arena)
            yield _measure(arena, cells, asked, lambda: _raw_memory(arena, cells))
        if disk and directory is not None:
            progress("disk")
            with contextlib.closing(StoreDirectory(directory, disk, os.getpid())) as place:
                files = Files.open(place, arena.stride, IDENTITY)
                try:
                    yield _measure(arena, files, asked, lambda: _raw_disk(directory / NAME, files))
                finally:
                    os.unlink(directory / NAME)


class _Meter:
    """What lanes have done so far, for one thread that waits for it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.filled: dict[int, float] = {}
        self.missed = 0
        self.lanes: Lanes | None = None

    def notify(self, *_: object) -> None:
        with self.changed:
            self.changed.notify_all()

    def note(self, task: Task) -> None:
        with self.changed:
            self.filled[task.generation] = time.perf_counter()
            self.changed.notify_all()

    def miss(self, _: Task) -> None:
        with self.changed:
            self.missed += 1
            self.changed.notify_all()

    def settled(self) -> int:
        assert self.lanes is not None
        return self.lanes.counters["wrote"] + self.lanes.counters["skipped"]

    def until(self, there: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(there, 120), "the replay tier did not go on for 120 s"


def _measure(arena: HostArena | DeviceArena, cells: Files | Pinned, asked: float, raw: Raw) -> LaneRow:
    meter, nbytes = _Meter(), arena.slot_bytes
    lanes = meter.lanes = Lanes(
        arena, [cells], filled=meter.note, missed=meter.miss, counted=meter.notify, crashed=meter.notify
    )
    lanes.start()
    lanes.scanned.wait()
    try:
        count = cells.cells
        fast = max(1, count // 4)
        begin = time.perf_counter()
        for number in range(fast):
            meter.until(lambda: meter.settled() > number - WRITE_BUFFERS)  # noqa: B023  called at once
            _offer(lanes, arena, number, nbytes)
        meter.until(lambda: meter.settled() == fast)
        write = fast * nbytes / (time.perf_counter() - begin) / GB
        begin = time.perf_counter()
        for number in range(fast, count):
            time.sleep(max(0.0, begin + (number - fast) * nbytes / (asked * GB) - time.perf_counter()))
            _offer(lanes, arena, number, nbytes)
        meter.until(lambda: meter.settled() == count)
        skipped = lanes.counters["skipped"] / max(1, count - fast)
        read, read_ms = _read(lanes, arena, meter, count, nbytes)
        without = raw()  # at the end: it leaves nothing that a scan would find whole
        return LaneRow(
            tier="disk" if isinstance(cells, Files) else "memory",
            slots=lanes.counters["wrote"],
            write=round(write, 3),
            asked=asked,
            skipped=round(skipped, 4),
            read=round(read, 3),
            read_ms=round(read_ms, 2),
            raw_write=round(without[0], 3),
            raw_read=round(without[1], 3),
            direct=isinstance(cells, Files) and cells.direct,
        )
    finally:
        lanes.close()


def _key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def _offer(lanes: Lanes, arena: HostArena | DeviceArena, number: int, nbytes: int) -> None:
    slot, generation = number % SLOTS, number + 1
    arena.begin(slot)
    arena.seal(slot, generation, nbytes)
    lanes.offer(Task(_key(number), slot, generation, nbytes, 1))


def _read(lanes: Lanes, arena: HostArena | DeviceArena, meter: _Meter, count: int, nbytes: int) -> tuple[float, float]:
    """GB/s, and the median ms of one slot, with as many asked for as the ring has slots."""
    asked: dict[int, float] = {}
    begin = time.perf_counter()
    for place, number in enumerate(random.Random(0).sample(range(count), count)):
        meter.until(lambda: len(asked) - len(meter.filled) - meter.missed < SLOTS)
        task = Task(_key(number), place % SLOTS, count + place + 1, nbytes, 1)
        now = time.perf_counter()
        if lanes.take(task):
            asked[task.generation] = now
    meter.until(lambda: len(meter.filled) + meter.missed == len(asked))
    took = time.perf_counter() - begin
    each = [1e3 * (meter.filled[generation] - at) for generation, at in asked.items() if generation in meter.filled]
    return len(each) * nbytes / took / GB, statistics.median(each)


def _raw_memory(arena: HostArena | DeviceArena, cells: Pinned) -> tuple[float, float]:
    """GB/s from the ring into a cell, and back, by one thread."""
    copier, count = Copier(), 16
    rates = []
    for into, source in ((cells.tensor(0), arena.tensor(0)), (arena.tensor(0), cells.tensor(0))):
        begin = time.perf_counter()
        for _ in range(count):
            if isinstance(arena, HostArena):  # torch copies by several threads there
                np.copyto(into.numpy(), source.numpy())
            else:
                copier.copy(into[: arena.slot_bytes], source[: arena.slot_bytes])
        rates.append(count * arena.slot_bytes / (time.perf_counter() - begin) / GB)
    return rates[0], rates[1]


def _raw_disk(path: Path, files: Files) -> tuple[float, float]:
    """GB/s into the first cells, by one thread as the writer is, and out of them, by READERS."""
    count = min(files.cells, 32)
    buffers = [HostArena.create(1, files.cell_bytes, None) for _ in range(READERS)]
    torch.frombuffer(buffers[0].slot(0), dtype=torch.uint8).random_()
    fd = os.open(path, os.O_RDWR | (os.O_DIRECT if files.direct else 0))
    try:
        begin = time.perf_counter()
        for cell in range(count):
            os.pwritev(fd, [buffers[0].slot(0)], offset(cell, files.cell_bytes))
        write = count * files.cell_bytes / (time.perf_counter() - begin) / GB

        def read(reader: int) -> None:
            for cell in range(reader, count, READERS):
                os.preadv(fd, [buffers[reader].slot(0)], offset(cell, files.cell_bytes))

        begin = time.perf_counter()
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(read, range(READERS)))
        return write, count * files.cell_bytes / (time.perf_counter() - begin) / GB
    finally:
        os.close(fd)
        for buffer in buffers:
            buffer.close()
