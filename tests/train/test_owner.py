"""Who owns a run's directory: one process at a time, named to the next, and nothing left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specd.errors import ConfigError
from specd.train import owner
from specd.train.owner import LOCK, owned

HOLD = (
    "import sys; from pathlib import Path; from specd.train.owner import owned\n"
    "with owned(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
)
HAMMER = """
import os, sys
from pathlib import Path
from specd.errors import ConfigError
from specd.train.owner import owned
place, had, refused = Path(sys.argv[1]), 0, 0
print(flush=True)
sys.stdin.readline()
while had < 150:
    try:
        with owned(place):
            os.close(os.open(place / "mark", os.O_CREAT | os.O_EXCL))
            os.unlink(place / "mark")
            had += 1
    except ConfigError as error:
        assert "trains in" in str(error), error
        refused += 1
print(refused)
"""


def taken(pid: int) -> str:
    return rf"process {pid} on {re.escape(socket.gethostname())} trains in '.*run': wait for its end.* resume .*run`"


def test_the_second_is_told_who_owns_it_and_nothing_is_left_behind(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b" / "run"
    with owned(place), pytest.raises(ConfigError, match=taken(os.getpid())), owned(place):
        pass
    assert not (tmp_path / "a").exists()
    (tmp_path / "run").mkdir()
    with owned(tmp_path / "run"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    assert [*(tmp_path / "run").iterdir()] == []
    with owned(place):
        (place / "run.json").touch()
    assert [*place.iterdir()] == [place / "run.json"]


def test_an_error_inside_leaves_nothing_either(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), owned(tmp_path / "run"):
        raise KeyboardInterrupt
    assert not (tmp_path / "run").exists()


def test_the_lock_of_a_killed_owner_is_free(tmp_path: Path) -> None:
    place = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ConfigError, match=taken(process.pid)), owned(place):
            pass
        process.kill()
    assert (place / LOCK).exists()
    with owned(place), pytest.raises(ConfigError, match=taken(os.getpid())), owned(place):
        pass


def test_no_two_own_it_though_its_file_and_directory_come_and_go(tmp_path: Path) -> None:
    place, refused = tmp_path / "runs" / "run", 0
    command = [sys.executable, "-c", HAMMER, str(place)]
    racers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)]
    for racer in racers:
        assert racer.stdout is not None
        racer.stdout.readline()
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write(b"\n")
        racer.stdin.flush()
    for racer in racers:
        said = racer.communicate(timeout=60)[0]
        assert racer.returncode == 0
        refused += int(said)
    assert refused, "they never met"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.fixture
def nameless(tmp_path: Path) -> Any:
    """The descriptor of a lock that is held, and whose file names a process that is gone."""
    (tmp_path / "run").mkdir()
    with subprocess.Popen(["true"]) as gone:
        pass
    fd = os.open(tmp_path / "run" / LOCK, os.O_CREAT | os.O_RDWR)
    os.write(fd, f"{gone.pid} {socket.gethostname()}\n".encode())
    fcntl.flock(fd, fcntl.LOCK_EX)
    yield fd
    os.close(fd)


def test_an_owner_that_has_not_written_its_name_yet_is_waited_for(tmp_path: Path, nameless: int) -> None:
    name = f"1 {socket.gethostname()}\n".encode()

    def write() -> None:
        os.ftruncate(nameless, 0)
        os.pwrite(nameless, name, 0)

    late = threading.Timer(0.1, write)
    late.start()
    with pytest.raises(ConfigError, match=taken(1)), owned(tmp_path / "run"):
        pass
    late.join()


def test_one_that_never_does_owns_it_nevertheless(
    tmp_path: Path, nameless: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "NAME_S", 0.05)
    with pytest.raises(ConfigError, match=r"process \d+ on \S+ trains in"), owned(tmp_path / "run"):
        pass
    os.ftruncate(nameless, 0)
    with pytest.raises(ConfigError, match="another process trains in"), owned(tmp_path / "run"):
        pass


def test_a_file_that_was_replaced_meanwhile_is_locked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, locked, lock = tmp_path / "run", list[int](), fcntl.flock

    def removed_first(fd: int, operation: int) -> None:
        if not locked:
            (place / LOCK).unlink()
            place.rmdir()
        locked.append(os.fstat(fd).st_nlink)
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with owned(place):
        assert (place / LOCK).read_text() == f"{os.getpid()} {socket.gethostname()}\n"
    assert locked == [0, 1]


def failing(number: int) -> Callable[..., None]:
    def flock(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_without_locks_it_warns_and_sees_owners_of_this_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    place = tmp_path / "run"
    with owned(place):
        assert "its file system has no locks" in caplog.text
        (place / LOCK).write_text(f"1 {socket.gethostname()}\n")
        with pytest.raises(ConfigError, match=taken(1)), owned(place):
            pass
    (place).mkdir()
    for stale in ("", "1 elsewhere\n", f"999999999 {socket.gethostname()}\n"):
        (place / LOCK).write_text(stale)
        with owned(place):
            pass


def test_what_cannot_be_made_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "elsewhere")

    def refused(place: Path, why: str) -> None:
        with (
            pytest.raises(ConfigError, match=rf"cannot make output '{place}': {why}.*: expected a directory that may"),
            owned(place),
        ):
            pass

    refused(tmp_path / "file", "File exists")
    refused(tmp_path / "file" / "run", "Not a directory")
    refused(tmp_path / "run", r"Too many levels of symbolic links \(.*\.lock\)")
    assert not (tmp_path / "elsewhere").exists()
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", failing(errno.EIO))
        refused(tmp_path / "other", "Input/output error")

    def forbidden(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", "run/.lock")

    monkeypatch.setattr(os, "open", forbidden)
    refused(tmp_path / "new" / "run", r"Permission denied \(run/\.lock\)")
    assert not (tmp_path / "new").exists()
