"""Directories of this user, and files that are there whole or not at all."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest

from specd.client.ask import ask_status
from specd.curve.keys import config_dir
from specd.errors import ConfigError
from specd.paths import being_written, cache_dir, check_private, check_socket, replacing, shown

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to make what belongs to another user")
NOBODY = 65534


def test_the_cache_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECD_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("SPECD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "specd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "specd"


def test_a_user_without_a_home_is_told_to_name_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number of its own."""
    for name in ("SPECD_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(user: int) -> None:
        raise KeyError(user)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(ConfigError, match=r"has no home directory: .*; set SPECD_CACHE"):
        cache_dir()
    with pytest.raises(ConfigError, match=r"has no home directory: .*; set XDG_CONFIG_HOME"):
        config_dir()


def test_a_name_that_is_not_utf8_can_be_shown() -> None:
    assert shown("caf\udce9.jsonl") == "caf\\xe9.jsonl"
    assert shown(Path(os.fsdecode(b"a/caf\xe9"))) == "a/caf\\xe9"
    assert shown("\ud800") == "\\ud800"
    assert shown(Path("café.jsonl")) == "café.jsonl"


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    being_written(file).write_bytes(b"of a killed process, and longer")
    for content, mode in ((b"one", 0o666), (b"two", 0o600)):
        with replacing(file, mode) as new:
            new.write(content)
            new.flush()
            assert file.exists() == (content == b"two"), "before it is whole nobody sees it"
        assert (file.read_bytes(), file.stat().st_mode & 0o077 == 0) == (content, mode == 0o600)
    with pytest.raises(OSError, match="full"), replacing(file) as new:
        raise OSError("full")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.json", b"two")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A socket in a private directory."""
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "d.sock"))
    return directory / "d.sock"


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_socket(path)
    with pytest.raises(ConfigError, match=re.escape(str(caught.value))):  # before anything is sent
        ask_status(f"ipc://{path}", 0.01)
    return str(caught.value)


def test_a_socket_of_ones_own_is_taken_and_one_to_come_is_awaited(path: Path) -> None:
    check_socket(path)
    check_socket(path.with_name("later"))
    check_socket(path.parent / "no" / "such")


def test_what_is_no_socket_is_refused(path: Path) -> None:
    path.unlink()
    path.touch()
    assert "is no socket" in refused(path)


def test_a_directory_that_others_can_write_to_is_refused(path: Path) -> None:
    path.parent.chmod(0o770)
    assert f"directory {path.parent} has mode 770" in refused(path)
    path.parent.chmod(0o1777)  # as /tmp: they cannot replace what is there
    check_socket(path)


@needs_root
@pytest.mark.parametrize("what", ["socket", "directory"])
def test_what_belongs_to_another_user_is_not_believed(path: Path, what: str) -> None:
    os.chown(path if what == "socket" else path.parent, NOBODY, -1)
    assert f"belongs to user {NOBODY}: expected one of this user's" in refused(path)


@needs_root
def test_a_link_that_another_user_can_point_elsewhere_is_refused(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path.parent)
    check_socket(link / path.name)
    check_private(link)
    os.chown(link, NOBODY, -1, follow_symlinks=False)
    assert f"is a symbolic link of user {NOBODY}" in refused(link / path.name)
    with pytest.raises(ConfigError, match=f"symbolic link of user {NOBODY}"):
        check_private(link)
