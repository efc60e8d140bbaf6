"""Key files: whose they are, what is in them, and that no message shows a secret."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from specd.curve import keys
from specd.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "specd"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_key_is_its_users_alone_whatever_the_umask(home: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        path, pair = keys.create("gpu1")
    finally:
        os.umask(before)
    assert (path, mode(path), mode(home)) == (home / "gpu1.key", 0o600, 0o700)
    assert keys.load("gpu1") == keys.load(str(path)) == pair
    assert keys.own_keys() == [path]


def test_a_public_half_needs_no_quotes(home: Path) -> None:
    for name in ("one", "two"):
        _, pair = keys.create(name)
        assert re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z.:+=/@%-]{39}", pair.public)
        assert keys.check_public(pair.public) == pair.public


def test_a_key_is_never_written_over(home: Path) -> None:
    path, pair = keys.create("gpu1")
    with pytest.raises(ConfigError, match=r"key 'gpu1' exists in .*gpu1\.key: choose another name"):
        keys.create("gpu1")
    assert keys.load(str(path)) == pair


@pytest.mark.parametrize("name", ["", ".", "../x", "a/b", "-x", "a b", "a\n", "ä", "x" * 65])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        keys.create(name)


def test_a_secret_is_shown_nowhere(home: Path) -> None:
    path, pair = keys.create("gpu1")
    assert pair.secret not in repr(pair) + str(pair)
    path.write_text(f"{pair.secret}\n{pair.secret}\n")
    slashed = "/" + pair.secret[1:]
    for asked in (pair.secret, slashed, str(path), "gpu1"):
        with pytest.raises(ConfigError) as error:
            keys.load(asked)
        assert pair.secret[1:] not in str(error.value)


def test_a_key_that_is_not_there_is_told_how_to_make(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read key file .*gpu1\.key: No such file .* `specd keys new gpu1`"):
        keys.load("gpu1")


@pytest.mark.parametrize("wide", [0o640, 0o604, 0o620])
def test_a_key_that_others_can_read_is_refused(home: Path, wide: int) -> None:
    path, _ = keys.create("gpu1")
    path.chmod(wide)
    with pytest.raises(ConfigError, match=rf"has mode {wide:o} and owner \d+: .* nobody else can read; chmod 600 it"):
        keys.load("gpu1")


@pytest.mark.parametrize("content", [b"", b"# only a comment\n", b"short\n", b"\xff\xfe\n", b"#" * 40 + b"\n"])
def test_a_malformed_key_file_is_refused_by_its_path(home: Path, content: bytes) -> None:
    path, _ = keys.create("gpu1")
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"key file .*gpu1\.key (holds no key|is no text)"):
        keys.load("gpu1")


def test_what_is_no_file_is_no_key_file(home: Path) -> None:
    home.mkdir(parents=True, mode=0o700)
    os.mkfifo(home / "gpu1.key", 0o600)
    with pytest.raises(ConfigError, match="expected a regular file"):
        keys.load("gpu1")


def test_a_directory_that_others_can_enter_takes_no_keys(home: Path) -> None:
    home.mkdir(parents=True)
    home.chmod(0o755)
    with pytest.raises(ConfigError, match=r"directory .* has mode 755 .*chmod 700 it"):
        keys.create("gpu1")
    assert list(home.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot write .*: Not a directory; XDG_CONFIG_HOME"):
        keys.create("gpu1")


@pytest.mark.parametrize("text", ["", "x" * 39, "x" * 41, "#" * 40, "a" * 39 + "'", "a" * 39 + "\n"])
def test_what_is_no_public_key_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected the 40 that `specd keys new` printed"):
        keys.check_public(text)
