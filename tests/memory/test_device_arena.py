"""The device arena, over a stand-in for CUDA: generations, the mirror and its races, and who may free what."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import fake_cuda
from specd.errors import TransportError
from specd.memory import cuda
from specd.memory.arena import PAGE, HostArena
from specd.memory.device_arena import DeviceArena
from specd.memory.segment import segment_path
from specd.transports.checks import pattern

SLOT_BYTES = 5000
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def device_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fake_cuda.install(monkeypatch)
    yield
    assert not fake_cuda.registered, "page-locked memory was unmapped"


@pytest.fixture
def arena(epoch: str) -> Iterator[DeviceArena]:
    """Three slots of a shared, mirrored arena."""
    with DeviceArena.create(3, SLOT_BYTES, "cuda:1", epoch, mirrored=True) as arena:
        yield arena


def fill(arena: DeviceArena, slot: int, generation: int, nbytes: int = 0) -> None:
    arena.begin(slot)
    arena.tensor(slot).fill_(generation % 251)
    arena.seal(slot, generation, nbytes)


def mirrored(arena: DeviceArena) -> list[int]:
    """What the host holds of each slot; fails when its bytes are of another generation."""
    found = [arena.ledger.generation(slot) for slot in range(arena.num_slots)]
    for slot, generation in enumerate(found):
        assert not generation or set(arena.ledger.slot(slot)) == {generation % 251}
    return found


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("with_mirror", [False, True])
def test_slots_are_aligned_and_disjoint(shared: bool, with_mirror: bool) -> None:
    name = secrets.token_hex(16) if shared else None
    with DeviceArena.create(5, SLOT_BYTES, "cuda", name, with_mirror) as arena:
        assert (arena.memory, arena.device, arena.num_slots, arena.slot_bytes) == ("device", "cuda:0", 5, SLOT_BYTES)
        assert arena.stride == 2 * PAGE
        assert arena.path == (segment_path(name) if name else "")
        assert (arena.mirrored, arena.ledger.slot_bytes) == (with_mirror, SLOT_BYTES * with_mirror)
        assert fake_cuda.registered == dict([arena.ledger.mapping])
        for slot in range(5):
            view = arena.tensor(slot)
            assert (view.dtype, tuple(view.shape)) == (torch.uint8, (SLOT_BYTES,))
            assert view.data_ptr() == arena.address(slot) == arena.address(0) + slot * arena.stride
            assert arena.address(slot) % PAGE == 0
            assert arena.word_address(slot) == arena.ledger.word_address(slot, device=True)
            assert arena.tensor(slot) is view
            view.fill_(slot)
        for slot in range(5):
            assert set(arena.tensor(slot).tolist()) == {slot}


def test_generations_are_the_device_slots_own(arena: DeviceArena) -> None:
    assert [arena.generation(slot) for slot in range(3)] == [0, 0, 0]
    fill(arena, 1, 1 << 63)
    assert [arena.generation(slot) for slot in range(3)] == [0, 1 << 63, 0]
    assert mirrored(arena) == [0, 0, 0]
    with HostArena.open(arena.path, 3, SLOT_BYTES, words_only=True) as words:
        assert words.generation(1, device=True) == 1 << 63
        arena.begin(1)
        assert words.generation(1, device=True) == 0


@pytest.mark.parametrize("slot", [-1, 3, 1 << 40])
def test_slots_out_of_range_are_refused(arena: DeviceArena, slot: int) -> None:
    calls: list[Callable[[int], object]] = [
        arena.tensor, arena.address, arena.begin, arena.generation, lambda slot: arena.seal(slot, 1)
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(TransportError, match="3 slots"):
            call(slot)
    with pytest.raises(TransportError, match="at least 1 byte"):
        DeviceArena.create(3, 0, "cuda:0", None, mirrored=False)


def test_host_bytes_are_written_in_place(arena: DeviceArena) -> None:
    arena.tensor(2).fill_(9)
    arena.write(2, pattern(b"nonce", 100))
    assert arena.tensor(2)[:100].tolist() == pattern(b"nonce", 100).tolist()
    assert set(arena.tensor(2)[100:].tolist()) == {9}


def test_slots_are_mirrored_while_a_session_reads_on_the_host(arena: DeviceArena) -> None:
    fill(arena, 0, 1)
    assert mirrored(arena) == [0, 0, 0]
    arena.read_on_host(b"a", True)
    assert mirrored(arena) == [1, 0, 0], "a slot that was resident already"
    fill(arena, 1, 2)
    arena.read_on_host(b"b", True)
    arena.read_on_host(b"b", True)
    arena.read_on_host(b"a", False)
    arena.read_on_host(b"unknown", False)
    fill(arena, 2, 3)
    assert mirrored(arena) == [1, 2, 3]
    arena.read_on_host(b"b", False)
    fill(arena, 0, 4)
    assert mirrored(arena) == [0, 2, 3], "a refilled slot's mirror is void"
    arena.begin(1)
    arena.read_on_host(b"c", True)
    assert mirrored(arena) == [4, 0, 3]
    assert [arena.generation(slot) for slot in range(3)] == [4, 0, 3]


def test_only_the_bytes_that_count_are_mirrored(arena: DeviceArena) -> None:
    arena.read_on_host(b"a", True)
    fill(arena, 0, 1)
    fill(arena, 0, 2, nbytes=100)
    assert bytes(arena.ledger.slot(0)) == b"\2" * 100 + b"\1" * (SLOT_BYTES - 100)
    arena.read_on_host(b"a", False)
    fill(arena, 0, 3, nbytes=50)
    arena.read_on_host(b"a", True)
    assert bytes(arena.ledger.slot(0)) == b"\3" * 50 + b"\2" * 50 + b"\1" * (SLOT_BYTES - 100)


def test_without_a_mirror_nobody_reads_on_the_host(epoch: str) -> None:
    with DeviceArena.create(1, SLOT_BYTES, "cuda:0", epoch, mirrored=False) as arena:
        with pytest.raises(TransportError, match="no mirror"):
            arena.read_on_host(b"a", True)
        arena.read_on_host(b"a", False)
        fill(arena, 0, 1)
        assert os.stat(arena.path).st_size == PAGE


class Intruder(cuda.Copier):
    """A copier that lets something happen halfway."""

    def __init__(self, halfway: Callable[[], None]) -> None:
        super().__init__()
        self._halfway = halfway

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        half = len(into) // 2
        super().copy(into[:half], source[:half])
        self._halfway()
        super().copy(into[half:], source[half:])


def test_a_slot_that_is_refilled_while_it_is_mirrored_is_not_sealed_on_the_host(arena: DeviceArena) -> None:
    fill(arena, 0, 1)
    arena.begin(1)

    def refill() -> None:
        arena.begin(0)
        arena.tensor(0).fill_(2)

    arena._copier = Intruder(refill)
    arena.read_on_host(b"a", True)
    assert set(arena.ledger.slot(0)) == {1, 2}, "the copy should have been torn"
    assert mirrored(arena) == [0, 0, 0]
    arena._copier = cuda.Copier()
    arena.seal(0, 2)
    assert mirrored(arena) == [2, 0, 0]


def test_begin_does_not_wait_for_a_copy_and_two_copies_do_not_mix(arena: DeviceArena) -> None:
    fill(arena, 0, 1)
    halfway, go_on = threading.Event(), threading.Event()

    def pause() -> None:
        halfway.set()
        assert go_on.wait(20)

    arena._copier = Intruder(pause)
    turning_on = threading.Thread(target=arena.read_on_host, args=(b"a", True))
    turning_on.start()
    assert halfway.wait(20)
    arena._copier = cuda.Copier()
    arena.begin(0)  # on this thread, while the other one copies
    arena.tensor(0).fill_(2)
    sealing = threading.Thread(target=arena.seal, args=(0, 2))
    sealing.start()
    go_on.set()
    turning_on.join()
    sealing.join()
    assert mirrored(arena) == [2, 0, 0]


def test_readers_never_take_torn_bytes(epoch: str) -> None:
    """One thread refills, one turns the mirror on and off, two read: the words tell them what their bytes are worth."""
    nbytes, refills = 1 << 18, 400
    with DeviceArena.create(2, nbytes, "cuda:0", epoch, mirrored=True) as arena:
        done, good, errors = threading.Event(), [0, 0], []

        def read(side: int, generation: Callable[[int], int], source: Callable[[int], torch.Tensor]) -> None:
            into = torch.empty(nbytes, dtype=torch.uint8)
            turn = 0
            while not (done.is_set() and good[side]):
                slot, turn = turn % 2, turn + 1
                if (before := generation(slot)) == 0:
                    continue
                into.copy_(source(slot))
                if generation(slot) == before:
                    good[side] += 1
                    if not bool((into == before % 251).all()):
                        errors.append((side, before))

        def toggle() -> None:
            while not done.is_set():
                arena.read_on_host(b"a", True)
                arena.read_on_host(b"a", False)
            arena.read_on_host(b"a", True)

        threads = [
            threading.Thread(target=read, args=(0, arena.generation, arena.tensor)),
            threading.Thread(target=read, args=(1, arena.ledger.generation, arena.ledger.tensor)),
            threading.Thread(target=toggle),
        ]
        for thread in threads:
            thread.start()
        for generation in range(1, refills + 1):
            fill(arena, generation % 2, generation)
        done.set()
        for thread in threads:
            thread.join()
        assert not errors
        assert mirrored(arena) == [refills, refills - 1]


def test_memory_is_opened_by_its_handle(arena: DeviceArena) -> None:
    fill(arena, 2, 7)
    mapping = cuda.Mapping(arena.handle(), "cuda:0")
    assert set(mapping.tensor(2 * arena.stride, SLOT_BYTES).tolist()) == {7}
    mapping.close()


OWNER = """
import sys
import fake_cuda
fake_cuda.install()
from specd.memory.device_arena import DeviceArena
arena = DeviceArena.create(2, 5000, "cuda:0", sys.argv[1], mirrored=False)
for slot in range(2):
    arena.begin(slot)
    arena.tensor(slot).fill_(slot + 1)
    arena.seal(slot, slot + 1)
print(arena.handle().hex(), flush=True)
sys.stdin.readline()
arena.close()
print("closed", flush=True)
sys.stdin.readline()
"""


def test_another_process_reads_a_slot_and_its_generation_also_after_its_exporter_died(epoch: str) -> None:
    command = [sys.executable, "-c", OWNER, epoch]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "support"), str(ROOT)])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as owner:
        assert owner.stdout is not None
        assert owner.stdin is not None
        handle = bytes.fromhex(owner.stdout.readline())
        words = HostArena.open(segment_path(epoch), 2, 0, words_only=True)
        mapping = cuda.Mapping(handle, "cuda:1")
        # The end of the arena unlinks its ledger and leaves what it exported to the end of its process.
        owner.stdin.write("close\n")
        owner.stdin.flush()
        assert owner.stdout.readline() == "closed\n"
        assert not os.path.exists(segment_path(epoch))
        cuda.Mapping(handle, "cuda:1").close()
        owner.kill()
    for slot in range(2):
        assert words.generation(slot, device=True) == slot + 1
        assert set(mapping.tensor(slot * 2 * PAGE, 5000).tolist()) == {slot + 1}
    with pytest.raises(TransportError, match="does not find the daemon's process"):
        cuda.Mapping(handle, "cuda:1")
    mapping.close()
    words.close()


def test_private_memory_is_not_exported_and_lives_as_long_as_its_views() -> None:
    arena = DeviceArena.create(2, SLOT_BYTES, "cuda:0", None, mirrored=False)
    fill(arena, 1, 5)
    with pytest.raises(TransportError, match="private"):
        arena.handle()
    assert not fake_cuda.live
    view = arena.tensor(1)
    arena.close()
    assert set(view.tolist()) == {5}


def test_without_cupy_a_shared_ring_is_served_but_not_exported(epoch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch, cupy=False)
    with DeviceArena.create(2, SLOT_BYTES, "cuda:0", epoch, mirrored=True) as arena:
        arena.read_on_host(b"a", True)
        fill(arena, 0, 1)
        assert mirrored(arena) == [1, 0]
        with pytest.raises(TransportError, match="cupy"):
            arena.handle()


@pytest.mark.parametrize("exported", [False, True])
def test_closing_leaves_exported_memory_alone(epoch: str, exported: bool) -> None:
    arena = DeviceArena.create(2, SLOT_BYTES, "cuda:0", epoch, mirrored=True)
    fill(arena, 0, 1)
    if exported:
        arena.handle()
    for _ in range(2):
        arena.close()
    assert len(fake_cuda.live) == exported
    assert not os.path.exists(segment_path(epoch))
    assert "closed" in repr(arena)
    calls: list[Callable[[], object]] = [
        lambda: arena.tensor(0), lambda: arena.address(0), arena.handle, lambda: arena.begin(0),
        lambda: arena.seal(0, 2), lambda: arena.generation(0), lambda: arena.read_on_host(b"a", True),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(TransportError, match="closed"):
            call()
    for allocation in list(fake_cuda.live):
        allocation.free()


def test_what_cannot_be_had_leaves_nothing_behind(epoch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise TransportError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(cuda, "register", refuse)
        with pytest.raises(TransportError, match="no more"):
            DeviceArena.create(2, SLOT_BYTES, "cuda:0", epoch, mirrored=True)
    assert not fake_cuda.live
    monkeypatch.setattr(fake_cuda.Allocation, "__init__", refuse)
    with pytest.raises(TransportError, match="no more"):
        DeviceArena.create(2, SLOT_BYTES, "cuda:0", epoch, mirrored=True)


def test_running_out_of_torch_memory_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real function, not the stand-in's
    from specd.memory.device_arena import private_memory

    def full(*_args: object, **_kwargs: object) -> None:
        raise torch.OutOfMemoryError("no memory for 1 TB")

    assert private_memory(10_000, "cpu").data_ptr() % PAGE == 0
    assert private_memory(10_000, "cpu").numel() == 10_000
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(TransportError, match=r"cannot reserve 1 MiB on cuda:0: no memory.*fewer or shorter slots"):
        private_memory(1 << 20, "cuda:0")


@pytest.mark.gpu(1)
def test_a_gpu_ring_is_mirrored_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    nbytes = (8 << 20) + 17
    with DeviceArena.create(3, nbytes, "cuda", secrets.token_hex(16), mirrored=True) as arena:
        arena.read_on_host(b"a", True)
        for slot in range(3):
            data = pattern(bytes([slot]), nbytes)
            arena.begin(slot)
            arena.write(slot, data)
            arena.seal(slot, slot + 1)
            assert arena.ledger.generation(slot) == arena.generation(slot) == slot + 1
            assert np.array_equal(np.frombuffer(arena.ledger.slot(slot), np.uint8), data)
            assert np.array_equal(arena.tensor(slot).cpu().numpy(), data)
