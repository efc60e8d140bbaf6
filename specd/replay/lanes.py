"""The lanes of the replay tier: threads that read kept batches into slots, and keep what was announced, behind it.

A batch is looked for in memory first, then on the disk; each keeps a fixed part of its own, and nothing moves between
them. Whoever asks never waits: a slot that is to be kept is copied by one thread, into a cell in memory or into a
buffer that another thread writes to the disk. One that is refilled before is skipped, and kept the next time it comes
by: bursts, as of forwards that many batches share, wait in the ring's own slots.

    RAM of a disk's lanes: WRITE_BUFFERS + READERS cells, page-locked where the ring is on a GPU

A disk's bytes come to a slot by such a buffer, on the CPU, too: so what it does not answer can be computed into that
slot, as whatever still comes from there comes to no slot.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from specd.memory.arena import HostArena
from specd.memory.cuda import Copier
from specd.memory.device_arena import DeviceArena
from specd.metrics import Counters
from specd.replay.coding import Coded, Coder
from specd.replay.files import Files
from specd.replay.form import DamageError, whole_pages
from specd.replay.pinned import Pinned
from specd.replay.store import COUNTS, Entry, Store

log = logging.getLogger(__name__)

READERS = 4
WRITE_BUFFERS = 4
ERRORS = 3
"""Input or output errors in a row that switch a disk off."""
END_S = 10.0
STALL_S = 10.0
"""A disk that does not answer a read for so long is not used any more, nor is memory, whose readers wait with it."""
_LARGER = (
    "replay: a batch of %d tokens takes %s bytes and a cell has %s: such are not kept; start with a larger "
    "ring.slot_tokens, or train with a smaller data.batch_tokens"
)


class Task(NamedTuple):
    """A batch and its slot. key: content and what is held of it. nbytes: of its image. keep: whether it comes again.

    coded: how it is encoded, None where its image is the slot as it lies. note: the caller's.
    """

    key: bytes
    slot: int
    generation: int
    nbytes: int
    tokens: int
    keep: bool = True
    coded: Coded | None = None
    note: Any = None


class Tier:
    """Cells of one kind, and what lies in them. on: whether it is used; a disk is not until it was looked through."""

    def __init__(self, cells: Files | Pinned) -> None:
        self.cells = cells
        self.store = Store(cells.cells)
        self.on = isinstance(cells, Pinned)
        self.errors = 0


class Lanes:
    """The tiers of one ring, and their threads. `take` and `offer` may be called by any thread, and wait for nothing.

    coder: the tiers', of tasks that are coded. filled: called once a taken task's bytes are in its slot, which is
    sealed. missed: called if they could not be had, so that it is computed. counted: called after anything in
    `counters` changed. crashed: a thread ended by a fault.
    """

    def __init__(
        self,
        arena: HostArena | DeviceArena,
        tiers: list[Files | Pinned],
        coder: Coder | None = None,
        *,
        filled: Callable[[Task], None],
        missed: Callable[[Task], None],
        counted: Callable[[], None],
        crashed: Callable[[str], None],
    ) -> None:
        self._arena = arena
        self._filled, self._missed, self._counted, self._crashed = filled, missed, counted, crashed
        self.counters = Counters(COUNTS)
        self._lock = threading.Lock()  # of the stores, and of tiers
        self._tiers = [Tier(cells) for cells in tiers]
        self._disk = next((tier for tier in self._tiers if isinstance(tier.cells, Files)), None)
        self._bounce = Pinned(WRITE_BUFFERS + READERS, arena, coder) if self._disk else None
        self._buffers: queue.SimpleQueue[int] = queue.SimpleQueue()
        for buffer in range(WRITE_BUFFERS):
            self._buffers.put(buffer)
        self._reads: queue.SimpleQueue[tuple[Task, Tier, Entry] | None] = queue.SimpleQueue()
        self._copies: queue.SimpleQueue[tuple[Task, Tier, Entry] | None] = queue.SimpleQueue()
        self._writes: queue.SimpleQueue[tuple[Task, Tier, Entry, int] | None] = queue.SimpleQueue()
        self._reading: dict[int, tuple[Task, float]] = {}  # by its buffer: what is read from the disk, and since when
        self._larger = False  # a batch that no cell has room for was met
        self._ending = threading.Event()
        self.failed = ""
        """As of ReplayInfo."""
        self.scanned = threading.Event()
        """Whether it is known what lies on the disk."""
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to work."""
        for number in range(READERS):
            self._run(f"read-{number}", self._read_all, WRITE_BUFFERS + number)
        self._run("keep", self._copy_all)
        if self._disk is None:
            self.scanned.set()
        else:
            self._run("write", self._write_all)
            self._run("watch", self._watch)
            self._run("scan", self._scan, self._disk)

    @property
    def cells(self) -> int:
        """Cells that a batch can be kept in, without those of what is switched off."""
        with self._lock:
            return sum(tier.cells.cells for tier in self._tiers if tier.on or not self.failed)

    @property
    def used(self) -> int:
        """Cells that hold a batch."""
        with self._lock:
            return sum(tier.store.used for tier in self._tiers if tier.on)

    def lasts(self, lookups: int) -> None:
        """After how many lookups a batch that nobody asked for is old."""
        with self._lock:
            for tier in self._tiers:
                tier.store.horizon = lookups

    def take(self, task: Task) -> bool:
        """Whether a batch is kept: then it is read into its slot, and `filled` or `missed` is called."""
        found: tuple[Tier, Entry] | None = None
        with self._lock:
            for tier in self._tiers:
                if task.keep:
                    tier.store.turn()
                if found is None and tier.on and (entry := tier.store.look(task.key)) is not None:
                    found = tier, entry
            if found is not None:
                self._reads.put((task, *found))
        if found is None:
            self._count("miss", task.keep)
        return found is not None

    def offer(self, task: Task) -> None:
        """Keep a batch whose slot is announced, if there is room for it."""
        if not task.keep:
            return
        if task.nbytes > (most := self._tiers[0].cells.cell_bytes):
            if not self._larger:
                self._larger = True
                log.warning(_LARGER, task.tokens, f"{task.nbytes:,}", f"{most:,}")
            self._count("skipped")
            return
        with self._lock:
            claimed = self._claim(task.key)
        if claimed is None:
            return
        if self._copies.qsize() < self._arena.num_slots:  # else the first ones are refilled already
            self._copies.put((task, *claimed))
        else:
            self._give_up(*claimed)

    def close(self) -> None:
        """End the threads, each after what it does now. The arena must still be there. Idempotent."""
        self._ending.set()
        for _ in range(READERS):
            self._reads.put(None)
        self._copies.put(None)
        self._writes.put(None)
        self._buffers.put(0)  # whoever waits for one ends then
        limit = time.monotonic() + END_S
        for thread in self._threads:
            thread.join(max(0.0, limit - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            log.warning("the disk of the replay tier did not answer within %.0f s", END_S)
            return  # what it still writes to stays
        self._threads.clear()
        for cells in (*(tier.cells for tier in self._tiers), self._bounce):
            if cells is not None:
                cells.close()

    # Threads

    def _run(self, name: str, work: Callable[..., None], *arguments: Any) -> None:
        def guarded() -> None:
            try:
                work(*arguments)
            except BaseException:
                log.exception("a thread of the replay tier crashed")
                self._crashed("the replay tier failed")

        thread = threading.Thread(target=guarded, name=f"specd-replay-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _scan(self, disk: Tier) -> None:
        assert isinstance(disk.cells, Files)
        found, tokens, damaged = {}, 0, 0
        try:
            for cell in disk.cells.scan(self._ending.is_set):
                damaged += cell.damaged
                if cell.header is not None:
                    found[cell.cell] = cell.header.key
                    tokens += cell.header.tokens
        except OSError as error:
            self.failed = f"it cannot be read: {error.strerror or error}"
            log.warning("the disk of the replay tier cannot be read, so it is not used: %s", error)
        else:
            with self._lock:
                disk.store.load(found)
                disk.on = True
            how = "past the page cache" if disk.cells.direct else "through the page cache, without O_DIRECT"
            log.info("replay: %d of %d cells hold %d tokens, read %s", len(found), disk.cells.cells, tokens, how)
        if damaged:
            log.warning("replay: %d of %d cells are damaged, and are written anew", damaged, disk.cells.cells)
        self.counters.add("damaged", damaged)
        self.scanned.set()
        self._counted()

    def _read_all(self, bounce: int) -> None:
        copier = Copier()
        while (item := self._reads.get()) is not None and not self._ending.is_set():
            task, tier, entry = item
            cells, cell = tier.cells, entry.cell
            error: DamageError | OSError | None = None
            if isinstance(cells, Files):
                error = self._read(task, cells, cell, bounce)
                with self._lock:
                    if self._reading.pop(bounce, None) is None:  # it was computed meanwhile
                        tier.store.done(entry)
                        continue
                assert self._bounce is not None
                cells, cell = self._bounce, bounce
            if error is not None:
                self._lose(tier, entry, error)
                self._missed(task)
                continue
            cells.load(cell, task.slot, task.generation, task.nbytes, copier, task.coded)
            tier.errors = 0
            with self._lock:
                tier.store.done(entry)
            self._count("hit")  # before: whoever asks then is told of it
            self._filled(task)

    def _read(self, task: Task, disk: Files, cell: int, bounce: int) -> DamageError | OSError | None:
        """Read a batch into a buffer; returns why that failed."""
        assert self._bounce is not None
        with self._lock:
            self._reading[bounce] = task, time.monotonic()
        try:
            disk.read(cell, task.key, self._bounce.view(bounce)[: whole_pages(task.nbytes)])
        except (DamageError, OSError) as error:
            return error
        return None

    def _watch(self) -> None:
        """Have computed what a disk is asked for in vain."""
        while not self._ending.wait(STALL_S / 4):
            with self._lock:
                limit = time.monotonic() - STALL_S
                late = {buffer: task for buffer, (task, since) in self._reading.items() if since < limit}
                for buffer in late:
                    del self._reading[buffer]
                if late:
                    for tier in self._tiers:
                        tier.on = False
            if late:
                self.failed = f"it has not answered for {STALL_S:.0f} s"
                log.warning("the replay tier is switched off: its disk has not answered for %.0f s", STALL_S)
            for task in (*late.values(), *(self._unread() if late else ())):
                self._count("miss")
                self._missed(task)

    def _unread(self) -> Iterator[Task]:
        """Take back what no reader has begun with."""
        with contextlib.suppress(queue.Empty):
            while (item := self._reads.get_nowait()) is not None:
                task, tier, entry = item
                with self._lock:
                    tier.store.done(entry)
                yield task
            self._reads.put(None)  # for whom it was meant

    def _copy_all(self) -> None:
        copier = Copier()
        while (item := self._copies.get()) is not None and not self._ending.is_set():
            task, tier, entry = item
            if isinstance(tier.cells, Pinned):
                if tier.cells.save(entry.cell, task.slot, task.generation, task.nbytes, copier, task.coded):
                    self._keep(tier, entry)
                else:
                    self._give_up(tier, entry)
                continue
            assert self._bounce is not None
            buffer = self._buffers.get()
            if self._ending.is_set():
                return
            if self._bounce.save(buffer, task.slot, task.generation, task.nbytes, copier, task.coded):
                self._writes.put((*item, buffer))
            else:
                self._give_up(tier, entry)
                self._buffers.put(buffer)

    def _write_all(self) -> None:
        assert self._bounce is not None
        while (item := self._writes.get()) is not None and not self._ending.is_set():
            task, tier, entry, buffer = item
            assert isinstance(tier.cells, Files)
            image = self._bounce.view(buffer)[: whole_pages(task.nbytes)]
            image[task.nbytes :] = bytes(image.nbytes - task.nbytes)
            try:
                tier.cells.write(entry.cell, task.key, image, task.nbytes, task.tokens)
            except OSError as error:
                self._disk_failed(tier, error)
                self._give_up(tier, entry)
            else:
                tier.errors = 0
                self._keep(tier, entry)
            self._buffers.put(buffer)

    # What became of a batch

    def _claim(self, key: bytes) -> tuple[Tier, Entry] | None:
        """A cell for a batch that is nowhere yet."""
        if any(key in tier.store for tier in self._tiers if tier.on):
            return None
        for tier in self._tiers:
            if tier.on and (entry := tier.store.claim(key)) is not None:
                return tier, entry
        return None

    def _keep(self, tier: Tier, entry: Entry) -> None:
        with self._lock:
            tier.store.stored(entry)
        self._count("wrote")

    def _give_up(self, tier: Tier, entry: Entry) -> None:
        with self._lock:
            tier.store.abandon(entry)
        self._count("skipped")

    def _lose(self, tier: Tier, entry: Entry, error: DamageError | OSError) -> None:
        """A stored batch could not be read."""
        with self._lock:
            tier.store.drop(entry)
            tier.store.done(entry)
        if isinstance(error, DamageError):
            log.warning("replay: %s; it is computed again", error)
            self._count("damaged")
        else:
            self._disk_failed(tier, error)
        self._count("miss")

    def _disk_failed(self, tier: Tier, error: OSError) -> None:
        """The disk failed; after ERRORS times in a row it is not used any more."""
        tier.errors += 1
        log.info("replay: the disk failed: %s", error)
        if tier.errors >= ERRORS and tier.on:
            tier.on = False
            self.failed = f"{tier.errors} errors in a row: {error.strerror or error}"
            log.warning("the disk of the replay tier is switched off after %d errors in a row: %s", tier.errors, error)

    def _count(self, name: str, amount: int = 1) -> None:
        if amount:
            self.counters.add(name, amount)
            self._counted()
