"""The host arena: geometry, generations, what a trainer may open, and how long memory lives."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from specd.errors import TransportError
from specd.memory.arena import LINE, PAGE, HostArena
from specd.memory.segment import remove, segment_path


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("num_slots", "slot_bytes"), [(1, 1), (3, 4096), (64, 5000), (200, 12288)])
def test_slots_are_aligned_disjoint_and_zero(shared: bool, num_slots: int, slot_bytes: int) -> None:
    with HostArena.create(num_slots, slot_bytes, secrets.token_hex(16) if shared else None) as arena:
        assert (arena.memory, arena.num_slots, arena.slot_bytes, bool(arena.path)) == (
            "host",
            num_slots,
            slot_bytes,
            shared,
        )
        assert (arena.device, arena.ledger) == ("cpu", arena)
        assert arena.mapping.address % PAGE == 0
        for slot in range(num_slots):
            view = arena.slot(slot)
            assert len(view) == slot_bytes
            assert not any(view)
            assert arena.tensor(slot).data_ptr() == arena.address(slot) == arena.address(0) + slot * arena.stride
            assert arena.address(slot) % PAGE == 0
            assert arena.generation(slot) == 0
            view[:] = bytes([slot % 255 + 1]) * slot_bytes
            arena.seal(slot, slot + 1)
        for slot in range(num_slots):
            assert set(arena.slot(slot)) == {slot % 255 + 1}
            assert arena.generation(slot) == slot + 1


def test_a_kernel_without_huge_pages_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mapping(mmap.mmap):
        def madvise(self, *hint: int) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(mmap, "mmap", Mapping)
    with HostArena.create(2, 4096, None) as arena:
        arena.slot(1)[:] = b"x" * 4096
        assert isinstance(arena._map, Mapping)


def test_generation_words_hold_64_bits_and_begin_clears_only_its_own() -> None:
    with HostArena.create(3, 10, None) as arena:
        for slot, generation in enumerate((1, 1 << 63, (1 << 64) - 1)):
            arena.seal(slot, generation)
        arena.begin(1)
        assert [arena.generation(slot) for slot in range(3)] == [1, 0, (1 << 64) - 1]


def test_a_slot_has_a_generation_here_and_one_on_a_device() -> None:
    with HostArena.create(2, 10, None) as arena:
        arena.seal(1, 5)
        arena.seal(1, (1 << 64) - 2, device=True)
        assert (arena.generation(1), arena.generation(1, device=True)) == (5, (1 << 64) - 2)
        assert (arena.generation(0), arena.generation(0, device=True)) == (0, 0)
        for device, generation in ((False, 5), (True, (1 << 64) - 2)):
            word = ctypes.c_uint64.from_address(arena.word_address(1, device=device))
            assert word.value == generation
        arena.begin(1, device=True)
        assert (arena.generation(1), arena.generation(1, device=True)) == (5, 0)
        arena.begin(1)
        assert arena.generation(1) == 0


def test_generations_alone(epoch: str) -> None:
    with HostArena.create(100, 0, epoch) as arena, HostArena.open(arena.path, 100, 0) as view:
        assert arena.mapping.nbytes == os.stat(arena.path).st_size == 2 * PAGE
        arena.seal(99, 7, device=True)
        assert view.generation(99, device=True) == 7
        for call in (arena.slot, arena.tensor, arena.address, view.slot):
            with pytest.raises(TransportError, match="generations alone"):
                call(0)


def test_a_trainer_may_map_the_generations_alone(epoch: str) -> None:
    with (
        HostArena.create(3, 1 << 20, epoch) as arena,
        HostArena.open(arena.path, 3, 1 << 20, words_only=True) as view,
    ):
        assert view.mapping.nbytes == PAGE
        arena.seal(2, 9, device=True)
        assert view.generation(2, device=True) == 9
        with pytest.raises(TransportError, match="generations alone"):
            view.tensor(2)
        with pytest.raises(TransportError, match="bytes, expected"):
            HostArena.open(arena.path, 4, 1 << 20, words_only=True)


def test_a_mapping_that_can_be_page_locked_is_writable(epoch: str) -> None:
    with HostArena.create(1, PAGE, epoch) as arena, HostArena.open(arena.path, 1, PAGE, writable=True) as view:
        assert (view.writable, view.slot(0).readonly) == (True, False)
        maps = Path("/proc/self/maps").read_text().splitlines()
        assert [line.split()[1] for line in maps if epoch in line] == ["rw-s", "rw-s"]
        view.close()
        assert os.path.exists(arena.path), "a trainer unlinked the daemon's segment"


@pytest.mark.parametrize("slot", [-1, 2, 1 << 40])
def test_slots_out_of_range_are_refused(slot: int) -> None:
    with HostArena.create(2, 10, None) as arena:
        calls: list[Callable[[int], object]] = [
            arena.slot, arena.tensor, arena.address, arena.begin, arena.generation, lambda slot: arena.seal(slot, 1)
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(TransportError, match="2 slots"):
                call(slot)


@pytest.mark.parametrize(
    ("num_slots", "slot_bytes"), [(0, 1), (-1, 1), (1, -1), (1, -4096), (1 << 17, 1), (1, 1 << 60)]
)
def test_impossible_geometry_is_refused(num_slots: int, slot_bytes: int) -> None:
    with pytest.raises(TransportError, match="expected 1 to"):
        HostArena.create(num_slots, slot_bytes, None)


def test_a_trainer_sees_what_the_worker_writes(epoch: str) -> None:
    with HostArena.create(2, 5000, epoch) as arena, HostArena.open(arena.path, 2, 5000) as view:
        arena.slot(1)[:3] = b"abc"
        arena.seal(1, 9)
        assert view.generation(1) == 9
        assert bytes(view.slot(1)[:3]) == b"abc"
        assert view.tensor(1)[:3].tolist() == [97, 98, 99]
        assert not view.writable
        assert view.slot(0).readonly


def test_views_outlive_the_arena() -> None:
    arena = HostArena.create(1, 1 << 20, secrets.token_hex(16))
    reader = HostArena.open(arena.path, 1, 1 << 20)
    arena.tensor(0).fill_(7)
    tensor, view = reader.tensor(0), arena.slot(0)
    for each in (reader, arena, reader, arena):
        each.close()
    assert bool((tensor == 7).all())
    assert view[-1] == 7
    with pytest.raises(TransportError, match="closed"):
        arena.slot(0)
    with pytest.raises(TransportError, match="closed"):
        reader.generation(0)
    assert "closed" in repr(arena)


def test_closing_frees_the_memory(epoch: str) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(epoch)

    with HostArena.create(1, 4096, epoch) as arena:
        tensor = arena.tensor(0)
        assert mapped() == 1
    assert mapped() == 1
    del tensor
    assert mapped() == 0


@pytest.mark.parametrize(
    ("num_slots", "slot_bytes", "match"),
    [(2, 5000, "bytes, expected"), (1, 5001, "holds"), (3, 4096, "bytes, expected")],
)
def test_another_geometry_is_not_opened(epoch: str, num_slots: int, slot_bytes: int, match: str) -> None:
    with HostArena.create(1, 5000, epoch) as arena, pytest.raises(TransportError, match=match):
        HostArena.open(arena.path, num_slots, slot_bytes)


@pytest.mark.parametrize("offset", [0, 8, 12, 16, 24, 32])
def test_a_header_that_was_altered_is_not_opened(epoch: str, offset: int) -> None:
    with HostArena.create(1, 5000, epoch) as arena:
        with open(arena.path, "r+b") as file:
            file.seek(offset)
            file.write(b"\x7f")
        with pytest.raises(TransportError, match="holds"):
            HostArena.open(arena.path, 1, 5000)


def test_a_file_with_other_rights_is_not_opened(epoch: str) -> None:
    with HostArena.create(1, 4096, epoch) as arena:
        os.chmod(arena.path, 0o644)
        with pytest.raises(TransportError, match="mode 644"):
            HostArena.open(arena.path, 1, 4096)


def test_a_link_is_not_followed(epoch: str, tmp_path: Path) -> None:
    os.symlink(tmp_path, segment_path(epoch))
    try:
        with pytest.raises(TransportError, match="cannot open"):
            HostArena.open(segment_path(epoch), 1, 4096)
    finally:
        assert remove(epoch)


def test_the_header_has_one_line_per_slot(epoch: str) -> None:
    with HostArena.create(100, 10, epoch) as arena:
        arena.seal(99, 0x0102030405060708)
        with open(arena.path, "rb") as file:
            header = file.read(LINE * 101)
        assert header[:16] == b"specdmem\x02\0\0\0\x10\0\0\0"
        assert (
            header[16:64]
            == (100).to_bytes(8, "little") + (10).to_bytes(8, "little") + bytes.fromhex(epoch) + b"\0" * 16
        )
        assert header[LINE * 100 : LINE * 100 + 8] == bytes(range(8, 0, -1))


def test_host_memory_has_no_handle() -> None:
    with HostArena.create(1, 16, None) as arena, pytest.raises(TransportError, match="opens it by its path"):
        arena.handle()


def test_tensors_share_memory_with_the_slot() -> None:
    with HostArena.create(1, 16, None) as arena:
        arena.tensor(0).view(torch.float32).copy_(torch.arange(4.0))
        assert bytes(arena.slot(0)[4:8]) == b"\0\0\x80\x3f"
