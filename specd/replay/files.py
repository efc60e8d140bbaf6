"""The cells of a store on a disk: one preallocated file, read and written past the page cache where that works."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from specd.errors import ConfigError
from specd.replay import form
from specd.replay.form import PAGE, DamageError, Header, Identity, Super

log = logging.getLogger(__name__)

NAME = "states"
LOCK = "lock"
GB = 10**9


class Found(NamedTuple):
    """A cell as a scan finds it. damaged: it holds neither a batch nor nothing."""

    cell: int
    header: Header | None
    damaged: bool


class StoreDirectory:
    """A directory for one store, which no other process uses as long as this is open.

    owner: the process that a person would know as its user. Raises ConfigError for a directory that cannot be used, is
    in use, or has less room than `budget` bytes.
    """

    def __init__(self, directory: Path, budget: int, owner: int) -> None:
        self.directory, self.budget = directory, budget
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"--replay {directory} cannot be used: {error.strerror}; give a directory of this user on a local disk"
            ) from None
        try:
            if not _locked(self._lock):
                raise ConfigError(f"{_in_use(directory)}; give this daemon another --replay")
            self._check_room()
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{owner}\n".encode(), 0)
        except BaseException:
            self.close()
            raise

    def _check_room(self) -> None:
        facts = os.statvfs(self.directory)
        room = facts.f_bavail * facts.f_frsize
        with contextlib.suppress(FileNotFoundError):
            room += os.stat(self.directory / NAME).st_blocks * 512  # is it of the store that is here already
        if room < self.budget:
            raise ConfigError(_no_room(self.directory, room, self.budget))

    def close(self) -> None:
        """Let others use it. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class Files:
    """The cells of a store; `open` makes or finds them. Thread-safe for different cells.

    cells, cell_bytes: how many, and most bytes of an image, whole pages. direct: whether the page cache is left out.
    Its methods raise OSError where the disk fails.
    """

    def __init__(self, fd: int, cells: int, cell_bytes: int, direct: bool) -> None:
        self._fd = fd
        self.cells, self.cell_bytes, self.direct = cells, cell_bytes, direct

    @classmethod
    def open(cls, place: StoreDirectory, cell_bytes: int, identity: Identity) -> Files:
        """As many cells as the place's budget has room for; those that are there already keep their batches.

        Raises ConfigError for a store of other states or with other cells, and without enough room.
        """
        assert cell_bytes % PAGE == 0
        cells = (place.budget - PAGE) // form.stride(cell_bytes)
        if cells < 1:
            raise ConfigError(
                f"--replay-gb {place.budget / GB:g} has no room for one batch: it takes {cell_bytes / GB:.3f} GB here"
            )
        path = place.directory / NAME
        try:
            fd = _regular(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise ConfigError(
                f"--replay {place.directory} cannot be used: {path}: {error.strerror}; remove that, or give another"
            ) from None
        try:
            there = _super_of(fd, place.directory)
            if there is not None:
                _check_same(place.directory, there, identity, cell_bytes)
                _check_kept(place, cls(fd, there.cells, cell_bytes, True), cells)
            else:  # nobody knows whose states they are
                os.ftruncate(fd, 0)
            _resize(fd, place, form.offset(cells, cell_bytes))
            os.pwrite(fd, form.pack_super(Super(identity, cells, cell_bytes)), 0)
            os.fsync(fd)
        except BaseException:
            os.close(fd)
            raise
        fd, direct = _direct(path, fd, os.O_RDWR)
        return cls(fd, cells, cell_bytes, direct)

    @classmethod
    def view(cls, directory: Path) -> tuple[Files, Super]:
        """A store that is only read. Raises ConfigError where there is none."""
        path = directory / NAME
        try:
            fd = _regular(path, os.O_RDONLY)
        except OSError as error:
            raise ConfigError(
                f"{directory} is no store of states ({error.strerror}): expected the DIR of specd start --replay DIR"
            ) from None
        try:
            page = _super_of(fd, directory)
        except BaseException:
            os.close(fd)
            raise
        if page is None:
            os.close(fd)
            raise ConfigError(f"{directory} is no store of states yet: no daemon has begun to use it")
        fd, direct = _direct(path, fd, os.O_RDONLY)
        return cls(fd, page.cells, page.cell_bytes, direct), page

    def scan(self, stopped: Callable[[], bool] = lambda: False, first: int = 0) -> Iterator[Found]:
        """Every cell from `first` on, in order, by its header alone. stopped: asked before each."""
        page = _page()
        for cell in range(first, self.cells):
            if stopped():
                return
            self._all(os.preadv, cell, [page])
            try:
                yield Found(cell, form.parse_header(bytes(page), cell), False)
            except DamageError:
                yield Found(cell, None, True)

    def read(self, cell: int, key: bytes, image: memoryview) -> Header:
        """Put the batch of a cell into `image`, page-aligned, whole pages. Raises DamageError if it is not whole."""
        page = _page()
        self._all(os.preadv, cell, [page, image])
        header = form.parse_header(bytes(page), cell)
        if header is None or header.key != key or form.whole_pages(header.nbytes) != image.nbytes:
            raise DamageError(f"cell {cell} holds another batch")
        if form.digest_of(key, image) != header.digest:
            raise DamageError(f"the batch of cell {cell} is damaged")
        return header

    def write(self, cell: int, key: bytes, image: memoryview, nbytes: int, tokens: int) -> None:
        """Put a batch into a cell by one write. image: page-aligned, whole pages, zeros behind `nbytes`."""
        page = _page()
        page[:] = form.pack_header(cell, Header(key, nbytes, tokens, form.digest_of(key, image)))
        self._all(os.pwritev, cell, [page, image])

    def _all(self, call: Callable[[int, list[memoryview], int], int], cell: int, buffers: list[memoryview]) -> None:
        """Read or write all bytes of the buffers at the beginning of a cell."""
        begin = at = form.offset(cell, self.cell_bytes)
        total = sum(each.nbytes for each in buffers)
        while at < begin + total:
            moved = call(self._fd, _rest(buffers, at - begin), at)
            if moved <= 0:
                raise OSError(errno.EIO, f"the file ends in cell {cell}")
            at += moved
        if not self.direct:  # else the cache would push out what others have there
            os.posix_fadvise(self._fd, begin, total, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __repr__(self) -> str:
        return f"Files({self.cells} cells × {self.cell_bytes} bytes{', O_DIRECT' if self.direct else ''})"


@contextlib.contextmanager
def unused(directory: Path) -> Iterator[None]:
    """Nobody writes to a store meanwhile. Raises ConfigError while a daemon uses it."""
    try:
        lock = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield  # it was copied from elsewhere
        return
    except OSError as error:
        raise ConfigError(f"{directory / LOCK} cannot be read: {error.strerror}; run this as its user") from None
    try:
        if not _locked(lock):
            raise ConfigError(f"{_in_use(directory)}; stop that first")
        yield
    finally:
        os.close(lock)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _in_use(directory: Path) -> str:
    owner = (directory / LOCK).read_text().strip()
    return f"another daemon{f' (pid {owner})' if owner else ''} uses {directory}"


def _no_room(directory: Path, room: int, budget: int) -> str:
    free = f"{room / GB:,.1f}" if room >= GB else f"{room / GB:.3g}"
    return (
        f"{directory} has {free} GB free, --replay-gb asks {budget / GB:g}: give fewer, free some, or take another disk"
    )


def _regular(path: Path, access: int) -> int:
    """Open a file, without waiting for whoever is at the other end of what is none. Raises OSError."""
    fd = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no file")
    return fd


def _super_of(fd: int, directory: Path) -> Super | None:
    """Page 0 of an open store, None for a new one. Raises ConfigError for anything else."""
    page = os.pread(fd, PAGE, 0)
    try:
        return form.parse_super(page.ljust(PAGE, b"\0"))
    except DamageError as error:
        raise ConfigError(f"{directory / NAME} cannot be used: {error}; give another --replay, or remove it") from None


def _check_same(directory: Path, there: Super, identity: Identity, cell_bytes: int) -> None:
    if unlike := identity.unlike(there.identity):
        others = ", ".join(f"{name}: {getattr(identity, name)}, not {getattr(there.identity, name)}" for name in unlike)
        raise ConfigError(
            f"{directory} holds states of {there.identity}; this daemon's are of another {others}: give another "
            f"--replay, or remove it"
        )
    if cell_bytes != there.cell_bytes:
        raise ConfigError(
            f"{directory} has cells of {there.cell_bytes:,} bytes and this daemon's have {cell_bytes:,}: start "
            f"it with the same ring.slot_tokens and capture, give another --replay, or remove it"
        )


def _check_kept(place: StoreDirectory, there: Files, cells: int) -> None:
    """Refuse to give up cells that hold batches, which may have taken days."""
    try:
        lost = next((each.cell for each in there.scan(first=cells) if each.header is not None), None)
    except OSError:  # the file is shorter than its first page says
        return
    if lost is not None:
        least = -(-form.offset(there.cells, there.cell_bytes) * 1000 // GB) / 1000
        raise ConfigError(
            f"{place.directory} holds batches in {there.cells:,} cells, --replay-gb {place.budget / GB:g} has room for "
            f"{cells:,}: give at least {least:g}, another --replay, or remove it"
        )


def _resize(fd: int, place: StoreDirectory, size: int) -> None:
    """Give the file its size, backed by the disk, so that it is never full later."""
    before = os.fstat(fd).st_size
    try:
        if before > size:
            os.ftruncate(fd, size)
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        os.ftruncate(fd, before)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ConfigError(
                f"--replay {place.directory} cannot be used: {error.strerror}; take another disk"
            ) from None
        raise ConfigError(
            f"{place.directory} has no room for {size / GB:g} GB ({error.strerror}): give a smaller --replay-gb"
        ) from None


def _direct(path: Path, fd: int, access: int) -> tuple[int, bool]:
    """The file opened once more past the page cache if that can be read, and whether that is so; closes the other."""
    try:
        other = os.open(path, access | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return fd, False
    try:
        os.preadv(other, [_page()], 0)
    except OSError:
        os.close(other)
        return fd, False
    os.close(fd)
    return other, True


def _page() -> memoryview:
    """A page-aligned page."""
    return memoryview(mmap.mmap(-1, PAGE))


def _rest(buffers: list[memoryview], done: int) -> list[memoryview]:
    """What of the buffers is left behind the first `done` bytes."""
    rest: list[memoryview] = []
    for each in buffers:
        if done < each.nbytes:
            rest.append(each[done:])
        done = max(0, done - each.nbytes)
    return rest
