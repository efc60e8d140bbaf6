"""The lag window's cells: what is copied, in which order, and what a refill under a copy makes of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import zmq

import fake_cuda
from specd.errors import ConfigError
from specd.memory.arena import HostArena
from specd.memory.device_arena import DeviceArena
from specd.transports.checks import pattern
from specd.worker import messages as channel
from specd.worker.lag import LagCells

SLOT, GB = 3 * 4096, 5 * (3 * 4096 + 64) / 1e9 + 1e-5
ANSWER_MS = 10_000


@pytest.fixture(params=["host", "device"])
def arena(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostArena | DeviceArena]:
    if request.param == "host":
        with HostArena.create(3, SLOT, None) as found:
            yield found
    else:
        fake_cuda.install(monkeypatch)
        with DeviceArena.create(3, SLOT, "cuda:0", None, False) as device:
            yield device


class Bench:
    """Cells, and control's end of their pipe. crashed: what the thread ended by."""

    def __init__(self, arena: HostArena | DeviceArena) -> None:
        self.arena = arena
        self.crashed: list[str] = []
        self._context = zmq.Context()
        self._pipe: Any = self._context.socket(zmq.PULL)
        self._pipe.bind("inproc://control")
        self.cells = LagCells(arena, GB, self._outbox, self.crashed.append)

    def _outbox(self) -> Any:
        socket: Any = self._context.socket(zmq.PUSH)
        socket.connect("inproc://control")
        return socket

    def fill(self, slot: int, generation: int, nonce: bytes, nbytes: int = SLOT) -> None:
        self.cells.filling(slot, nbytes)
        self.arena.begin(slot)
        self.arena.write(slot, pattern(nonce, nbytes))
        self.arena.seal(slot, generation, nbytes)

    def hear(self) -> Any:
        assert self._pipe.poll(ANSWER_MS), f"no answer; {self.crashed}"
        return channel.decode(self._pipe.recv())

    def holds(self, slot: int, nonce: bytes, nbytes: int = SLOT) -> bool:
        return np.array_equal(self.arena.tensor(slot)[:nbytes].numpy(), pattern(nonce, nbytes))

    def close(self) -> None:
        self.cells.close()
        self._pipe.close(linger=0)
        self._context.term()


@pytest.fixture
def bench(arena: HostArena | DeviceArena) -> Iterator[Bench]:
    with closing(Bench(arena)) as bench:
        yield bench


def save(number: int, slot: int, generation: int, cell: int) -> channel.SaveSlot:
    return channel.SaveSlot(number=number, slot=slot, generation=generation, cell=cell)


def load(slot: int, generation: int, cell: int) -> channel.LoadSlot:
    return channel.LoadSlot(slot=slot, generation=generation, cell=cell)


def test_a_slot_comes_back_from_its_cell_byte_for_byte(bench: Bench) -> None:
    assert len(bench.cells) == 5
    bench.fill(0, 7, b"a")
    bench.cells.copy(save(1, 0, 7, 4))
    assert bench.hear() == channel.Saved(number=1, ok=True)
    bench.fill(0, 8, b"b", 5000)
    bench.cells.copy(save(2, 0, 8, 0))
    bench.cells.copy(load(1, 3, 4))
    bench.cells.copy(load(2, 5, 0))
    assert bench.hear() == channel.Saved(number=2, ok=True)
    for slot, generation in ((1, 3), (2, 5)):
        assert bench.hear() == channel.Filled(slot=slot, generation=generation, target_us=0, replayed=True)
        assert bench.arena.generation(slot) == generation
    assert bench.holds(1, b"a")
    assert bench.holds(2, b"b", 5000)


def test_a_cell_that_is_claimed_again_is_read_before(bench: Bench) -> None:
    bench.fill(0, 1, b"first")
    bench.fill(1, 1, b"second", 4096)
    for note in (save(1, 0, 1, 3), load(2, 1, 3), save(2, 1, 1, 3), load(0, 2, 3)):
        bench.cells.copy(note)
    assert [type(bench.hear()) for _ in range(4)] == [channel.Saved, channel.Filled, channel.Saved, channel.Filled]
    assert bench.holds(2, b"first")
    assert bench.holds(0, b"second", 4096)


def test_a_slot_that_is_filled_anew_before_its_copy_is_not_saved(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next fill is of another size, and announced before the copy begins: it says nothing of the bytes saved."""
    go, save_ = threading.Event(), bench.cells._cells.save

    def late(*arguments: Any) -> bool:
        assert go.wait(10)
        return save_(*arguments)

    monkeypatch.setattr(bench.cells._cells, "save", late)
    bench.fill(0, 1, b"whole")
    bench.fill(1, 1, b"kept")
    bench.cells.copy(save(1, 0, 1, 0))
    bench.cells.copy(save(2, 1, 1, 1))
    bench.arena.begin(0)
    bench.cells.filling(1, 100)
    go.set()
    assert bench.hear() == channel.Saved(number=1, ok=False)
    assert bench.hear() == channel.Saved(number=2, ok=True)
    bench.cells.copy(load(2, 1, 1))
    bench.hear()
    assert bench.holds(2, b"kept")


def test_a_fault_ends_the_worker(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(bench.cells._cells, "save", fail)
    bench.fill(0, 1, b"")
    bench.cells.copy(save(1, 0, 1, 0))
    bench.cells._thread.join(10)
    assert bench.crashed == ["the lag window failed"]
    assert "an illegal address" in caplog.text


def test_too_little_memory_is_said_with_its_setting(arena: HostArena | DeviceArena) -> None:
    for gb, why in ((1e-6, "--lag-gb 1e-06 has no room for one batch"), (1e6, "--lag-gb 1e.06: this host has")):
        with pytest.raises(ConfigError, match=why):
            LagCells(arena, gb, lambda: pytest.fail("no thread was to begin"), print)
