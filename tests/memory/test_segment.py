"""Segments: what they are called, who may remove them, and what happens when shared memory is full."""

from __future__ import annotations

import errno
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from specd.errors import TransportError
from specd.memory import segment
from specd.memory.arena import HostArena
from specd.memory.segment import is_segment_path, remove, segment_path, sweep


def test_a_segment_is_private_to_the_user_and_named_once(epoch: str) -> None:
    with HostArena.create(1, 4096, epoch) as arena:
        assert arena.path == f"/dev/shm/specd-{os.getuid()}-{epoch}"
        assert os.stat(arena.path).st_mode & 0o777 == 0o600
        assert os.stat(arena.path).st_blocks * 512 >= arena.mapping.nbytes, "not backed by memory"
        with pytest.raises(TransportError, match="cannot create"):
            HostArena.create(1, 4096, epoch)


@pytest.mark.parametrize("epoch", ["", "xyz", "../../etc/passwd", "abcdefg0", "ABCDEF00", "abc", "ab" * 40])
def test_epochs_that_are_not_hex_are_refused(epoch: str) -> None:
    with pytest.raises(TransportError, match="hex"):
        HostArena.create(1, 4096, epoch)
    assert not is_segment_path(f"/dev/shm/specd-{os.getuid()}-{epoch}") or epoch == "abc"


def test_a_ring_that_does_not_fit_is_refused_with_the_remedy(epoch: str) -> None:
    with pytest.raises(TransportError, match=r"has \d+ MiB free.*fewer or shorter slots.*enlarge"):
        HostArena.create(1000, 1 << 40, epoch)


def test_running_out_of_shared_memory_is_reported_and_leaves_nothing(
    epoch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TransportError, match="fewer or shorter slots"):
        HostArena.create(1, 4096, epoch)


def test_remove_takes_a_path_or_an_epoch_of_this_user_only(epoch: str) -> None:
    for name in (epoch, segment_path(epoch)):
        with HostArena.create(1, 4096, epoch):
            assert remove(name)
            assert not remove(name)
    for name in ("/etc/passwd", "", f"/dev/shm/specd-{os.getuid() + 1}-{epoch}"):
        with pytest.raises(TransportError):
            remove(name)


OWNER = """
import sys
from specd.memory.arena import HostArena
arena = HostArena.create(1, 4096, sys.argv[1])
print(arena.path, flush=True)
sys.stdin.read()
"""


def test_sweep_takes_what_a_killed_owner_left_and_nothing_else(
    epoch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", OWNER, epoch]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        path = owner.stdout.readline().strip()
        assert path == segment_path(epoch)
        assert path not in sweep()
        owner.kill()
    with HostArena.create(1, 4096, secrets.token_hex(16)) as living:
        assert os.path.exists(path)
        swept = sweep()
        assert path in swept
        assert living.path not in swept
        assert os.path.exists(living.path)
    monkeypatch.setattr(segment, "SHM_DIR", str(tmp_path / "missing"))
    assert sweep() == []
