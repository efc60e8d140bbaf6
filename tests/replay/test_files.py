"""A store on a disk: whatever is torn, flipped, in a wrong place or another's is found, and none of it is served."""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from specd.errors import ConfigError
from specd.replay import files, form
from specd.replay.files import Files, StoreDirectory, unused
from specd.replay.form import PAGE, DamageError, Identity

CELL = 3 * PAGE
CELLS = 6
BUDGET = form.offset(CELLS, CELL) + 100
IDENTITY = Identity(
    model="tiny", fingerprint="llama:64", backend="transformers 5.0", torch="2.9", device="cpu", exact=True
)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def image(number: int, pages: int = 3) -> memoryview:
    """A batch of nearly so many pages."""
    view = memoryview(mmap.mmap(-1, pages * PAGE))
    view[:-7] = random.Random(number).randbytes(view.nbytes - 7)
    return view


class Disk:
    """A store in a directory, with all cells but the last written: cell i holds batch i."""

    def __init__(self, directory: Path) -> None:
        self.place = StoreDirectory(directory, BUDGET, os.getpid())
        self.files = Files.open(self.place, CELL, IDENTITY)
        self.path = directory / files.NAME
        for cell in range(CELLS - 1):
            batch = image(cell)
            self.files.write(cell, key(cell), batch, batch.nbytes - 7, 10 + cell)

    def at(self, cell: int) -> int:
        return form.offset(cell, CELL)

    def patch(self, offset: int, data: bytes) -> bytes:
        """Change bytes of the file; returns what was there."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            before = file.read(len(data))
            file.seek(offset)
            file.write(data)
            return before

    def served(self, cell: int) -> bytes | None:
        """The bytes that a reader of a cell gets, None for damage."""
        into = memoryview(mmap.mmap(-1, CELL))
        try:
            self.files.read(cell, key(cell), into)
        except DamageError:
            return None
        return bytes(into)

    def close(self) -> None:
        self.files.close()
        self.place.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    found = Disk(tmp_path / "store")
    yield found
    found.close()


def again(disk: Disk, cell_bytes: int = CELL, identity: Identity = IDENTITY, budget: int = BUDGET) -> Files:
    """What the next daemon opens."""
    disk.close()
    disk.place = StoreDirectory(disk.path.parent, budget, 4242)
    disk.files = Files.open(disk.place, cell_bytes, identity)
    return disk.files


def test_what_was_written_is_there_for_the_next_daemon(disk: Disk) -> None:
    found = list(again(disk).scan())
    assert [each.header.key if each.header else None for each in found] == [*map(key, range(CELLS - 1)), None]
    assert [each.header.tokens for each in found if each.header] == list(range(10, 15))
    assert not any(each.damaged for each in found)
    assert [disk.served(cell) for cell in range(CELLS - 1)] == [bytes(image(cell)) for cell in range(CELLS - 1)]
    assert disk.path.stat().st_size <= BUDGET
    assert disk.path.stat().st_mode & 0o777 == 0o600


def test_a_batch_of_fewer_pages_has_a_cell_of_its_own(disk: Disk) -> None:
    small, into = image(77, 1), memoryview(mmap.mmap(-1, PAGE))
    disk.files.write(1, key(77), small, small.nbytes, 3)
    assert disk.files.read(1, key(77), into).nbytes == small.nbytes
    assert into == small
    assert disk.served(1) is None
    assert disk.served(0) == bytes(image(0))
    assert disk.served(2) == bytes(image(2))


@pytest.mark.parametrize("pages", range(4))
def test_a_write_that_was_torn_at_any_page_is_found(pages: int, disk: Disk) -> None:
    """Over what another batch left there: so many pages are new, the rest are old."""
    whole = disk.patch(disk.at(2), bytes(4 * PAGE))
    disk.patch(disk.at(2), whole)
    disk.files.write(2, key(9), image(9), CELL - 7, 1)
    new = disk.patch(disk.at(2), bytes(4 * PAGE))
    disk.patch(disk.at(2), new[: pages * PAGE] + whole[pages * PAGE :])
    into = memoryview(mmap.mmap(-1, CELL))
    with pytest.raises(DamageError):
        disk.files.read(2, key(9), into)
    if pages:
        assert disk.served(2) is None
    else:
        assert disk.served(2) == bytes(image(2)), "nothing of the new one came to the disk"


FIELDS = {"magic": 0, "cell": 8, "key": 16, "nbytes": 48, "tokens": 56, "digest": 64, "zeros": 2000, "sum": PAGE - 1}


@pytest.mark.parametrize("at", FIELDS.values(), ids=FIELDS.keys())
def test_a_header_with_one_bit_flipped_is_damage(at: int, disk: Disk) -> None:
    for bit in range(8):
        before = disk.patch(disk.at(3) + at, b"\0")
        disk.patch(disk.at(3) + at, bytes([before[0] ^ 1 << bit]))
        assert disk.served(3) is None
        assert [each.cell for each in disk.files.scan() if each.damaged] == [3]
        disk.patch(disk.at(3) + at, before)
    assert disk.served(3) is not None


def test_each_of_400_flipped_bytes_is_found_and_none_is_served(disk: Disk) -> None:
    rng = random.Random(5)
    for _ in range(400):
        cell, at = rng.randrange(CELLS - 1), rng.randrange(PAGE + CELL)
        before = disk.patch(disk.at(cell) + at, b"\0")
        disk.patch(disk.at(cell) + at, bytes([before[0] ^ rng.randrange(1, 256)]))
        assert disk.served(cell) is None, (cell, at)
        disk.patch(disk.at(cell) + at, before)
    assert all(disk.served(cell) == bytes(image(cell)) for cell in range(CELLS - 1))


def test_a_cell_in_the_wrong_place_is_damage(disk: Disk) -> None:
    whole = disk.patch(disk.at(1), bytes(4 * PAGE))
    disk.patch(disk.at(4), whole)
    assert [each.cell for each in disk.files.scan() if each.damaged] == [4]
    with pytest.raises(DamageError, match="cell 4"):
        disk.files.read(4, key(1), memoryview(mmap.mmap(-1, CELL)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fingerprint": "llama:65"}, "another fingerprint: llama:65, not llama:64"),
        (
            {"exact": False, "backend": "sglang 0.5"},
            "another backend: sglang 0.5, not transformers 5.0, exact: False, not True",
        ),
        ({"encoding": "fp8"}, "another encoding: fp8, not raw"),
    ],
)
def test_a_store_of_other_states_is_refused_and_stays(change: dict[str, Any], told: str, disk: Disk) -> None:
    with pytest.raises(
        ConfigError, match=rf"holds states of tiny on transformers 5.0, exact.*{told}.*another --replay"
    ):
        again(disk, identity=replace(IDENTITY, **change))
    assert len([each for each in again(disk, identity=replace(IDENTITY, model="renamed")).scan() if each.header]) == 5


def test_other_cells_are_refused_and_another_budget_is_taken(disk: Disk) -> None:
    with pytest.raises(ConfigError, match=r"cells of 12,288 bytes and this daemon's have 8,192"):
        again(disk, cell_bytes=2 * PAGE)
    with pytest.raises(ConfigError, match="no room for one batch"):
        again(disk, budget=CELL)
    with pytest.raises(ConfigError, match=r"batches in 6 cells, --replay-gb .* room for 4: give at least 0.001,"):
        again(disk, budget=form.offset(4, CELL))
    assert [bool(each.header) for each in again(disk, budget=form.offset(5, CELL)).scan()] == [True] * 5
    assert [bool(each.header) for each in again(disk, budget=form.offset(9, CELL)).scan()] == [True] * 5 + [False] * 4


@pytest.mark.parametrize(
    ("at", "told"), [(0, "no store of specd's"), (8, "version"), (40, "damaged"), (4090, "damaged")]
)
def test_a_first_page_that_is_not_whole_is_refused(at: int, told: str, disk: Disk) -> None:
    disk.patch(at, b"\xff")
    with pytest.raises(ConfigError, match=rf"{told}.*remove it"):
        again(disk)
    disk.patch(0, bytes(PAGE))
    assert not any(each.header or each.damaged for each in again(disk).scan()), "whose states they are, nobody knows"


def test_another_daemons_store_is_refused_and_a_dead_ones_is_not(disk: Disk) -> None:
    with pytest.raises(ConfigError, match=rf"another daemon .pid {os.getpid()}. uses"):
        StoreDirectory(disk.path.parent, BUDGET, 1)
    with pytest.raises(ConfigError, match="stop that first"), unused(disk.path.parent):
        pass
    directory = disk.path.parent
    disk.close()
    code = f"import sys, pathlib, specd.replay.files as f\np = pathlib.Path({str(directory)!r})"
    code += f"\np = f.StoreDirectory(p, {BUDGET}, 7)"
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}\nprint(1, flush=True)\nsys.stdin.read()"], stdin=-1, stdout=-1
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline()
        with pytest.raises(ConfigError, match=r"another daemon .pid 7. uses"):
            StoreDirectory(directory, BUDGET, 1)
        other.kill()
    again(disk)


def test_too_little_room_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"has [\d,.]+ GB free, --replay-gb asks 1e\+06"):
        StoreDirectory(tmp_path / "new", 10**15, 1)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = StoreDirectory(tmp_path / "new", BUDGET, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(ConfigError, match=r"no room for .* .No space left"):
            Files.open(place, CELL, IDENTITY)
    Files.open(place, CELL, IDENTITY).close()
    for make in (lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to(tmp_path / "none" / "there")):
        path = tmp_path / "new" / files.NAME
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        with pytest.raises(ConfigError, match=r"cannot be used: .*states: .*remove that, or give another"):
            Files.open(place, CELL, IDENTITY)
        with pytest.raises(ConfigError, match="is no store of states"):
            Files.view(path.parent)
    place.close()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used: Not a directory"):
        StoreDirectory(tmp_path / "file" / "below", BUDGET, 1)


def test_what_the_disk_says_is_raised_and_short_moves_go_on(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.preadv, os.pwritev
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda fd, buffers, at: read(fd, [buffers[0][:PAGE]], at))
        patch.setattr(os, "pwritev", lambda fd, buffers, at: write(fd, [buffers[0][:PAGE]], at))
        disk.files.write(5, key(5), image(5), CELL - 7, 1)
        assert [disk.served(cell) for cell in range(CELLS)] == [bytes(image(cell)) for cell in range(CELLS)]

    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        patch.setattr(os, "pwritev", broken)
        for attempt in (
            lambda: disk.served(0),
            lambda: list(disk.files.scan()),
            lambda: disk.files.write(0, key(0), image(0), 1, 1),
        ):
            with pytest.raises(OSError, match="Input/output"):
                attempt()
    os.truncate(disk.path, disk.at(2) + PAGE)
    with pytest.raises(OSError, match="the file ends in cell 2"):
        disk.served(2)


def test_without_o_direct_it_goes_through_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def plain(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", plain)
    disk = Disk(tmp_path / "store")
    assert not disk.files.direct
    assert disk.served(1) == bytes(image(1))
    disk.close()


def test_a_store_is_looked_at_without_changing_it(disk: Disk, tmp_path: Path) -> None:
    there, page = Files.view(disk.path.parent)
    assert (page.identity, page.cells, page.cell_bytes) == (IDENTITY, CELLS, CELL)
    assert sum(each.header is not None for each in there.scan()) == CELLS - 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        there.write(0, key(0), image(0), 1, 1)
    there.close()
    with pytest.raises(ConfigError, match="is no store of states"):
        Files.view(tmp_path)
    (tmp_path / files.NAME).touch()
    with pytest.raises(ConfigError, match="no daemon has begun"):
        Files.view(tmp_path)
