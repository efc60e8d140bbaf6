"""Whom a daemon lets in: how the file is changed, read again, and what a bad line or a missing file means."""

from __future__ import annotations

import errno
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from specd.curve import authorized, keys
from specd.curve.authorized import Authorized, allow, parse, revoke
from specd.errors import ConfigError

ALICE, BOB = keys.draw().public, keys.draw().public


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "authorized"


def test_who_is_allowed_is_let_in_until_revoked(path: Path) -> None:
    assert allow(path, "alice", ALICE)
    assert not allow(path, "alice", ALICE)
    assert allow(path, "bob", BOB)
    known = Authorized(path)
    assert (len(known), known.name(ALICE), known.name(BOB), BOB in known) == (2, "alice", "bob", True)
    revoke(path, "alice")
    assert known.refresh()
    assert (ALICE in known, known.name(BOB)) == (False, "bob")
    assert not known.refresh()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_name_has_one_key_and_a_key_one_name(path: Path) -> None:
    allow(path, "alice", ALICE)
    with pytest.raises(ConfigError, match=r"alice has another key in .*specd keys revoke alice"):
        allow(path, "alice", BOB)
    with pytest.raises(ConfigError, match="that key is alice's already"):
        allow(path, "bob", ALICE)
    assert path.read_text() == f"alice {ALICE}\n"


def test_comments_stay_where_they_are(path: Path) -> None:
    path.write_text(f"# the team\nalice {ALICE} since spring\n\n#bob {BOB}\n")
    path.chmod(0o600)
    assert authorized.read(path) == ({ALICE: "alice"}, [])
    allow(path, "bob", BOB)
    revoke(path, "alice")
    assert path.read_text() == f"# the team\n\n#bob {BOB}\nbob {BOB}\n"


def test_revoking_works_beside_a_bad_line_and_allowing_does_not(path: Path) -> None:
    path.write_text(f"alice {ALICE}\ncarol typo\n")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="the key of carol, 'typo' of 4 characters"):
        allow(path, "bob", BOB)
    revoke(path, "alice")
    assert path.read_text() == "carol typo\n"


def test_revoking_nobody_says_who_there_is(path: Path) -> None:
    allow(path, "alice", ALICE)
    with pytest.raises(ConfigError, match=r"'bob' is not in .*: it lets in alice"):
        revoke(path, "bob")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("alice", "the key of alice, ''"),
        ("alice short", "'short' of 5 characters"),
        (f"al/ice {ALICE}", "the name 'al/ice'"),
        (f"bob {ALICE}", "bob or its key is there twice"),
        (f"zoe {BOB}", "zoe or its key is there twice"),
    ],
)
def test_a_bad_line_lets_nobody_in_and_the_others_count(line: str, said: str) -> None:
    found, problems = parse([f"bob {BOB}", f"zoe {keys.draw().public}", line], "file")
    assert list(found.values()) == ["bob", "zoe"]
    assert said in problems[0]


def test_a_bad_line_ends_nothing_while_the_daemon_runs(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    allow(path, "alice", ALICE)
    allow(path, "bob", BOB)
    known = Authorized(path)
    path.write_text(f"alice {ALICE}\nbob oops\n")
    with caplog.at_level(logging.ERROR):
        assert known.refresh()
    assert (ALICE in known, BOB in known) == (True, False)
    assert "the key of bob, 'oops'" in caplog.text
    with pytest.raises(ConfigError, match="the key of bob, 'oops'"):
        Authorized(path)


@pytest.mark.parametrize("fault", ["missing", "writable"])
def test_a_file_that_is_not_to_be_trusted_lets_nobody_in(
    path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    allow(path, "alice", ALICE)
    known = Authorized(path)
    if fault == "missing":
        path.unlink()
    else:
        path.chmod(0o620)
    with caplog.at_level(logging.ERROR):
        assert known.refresh()
    assert "nobody is let in" in caplog.text
    assert len(known) == 0
    if fault == "writable":
        with pytest.raises(ConfigError, match="nobody else can write"):
            Authorized(path)
        with pytest.raises(ConfigError, match="nobody else can write"):
            allow(path, "bob", BOB)


def test_a_file_that_cannot_be_read_just_now_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that uses up the daemon's descriptors must not end everybody's session."""
    allow(path, "alice", ALICE)
    known = Authorized(path)
    allow(path, "bob", BOB)

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        assert not known.refresh()
    assert ALICE in known
    assert known.refresh()
    assert BOB in known


def test_a_missing_file_is_told_at_the_start(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        known = Authorized(path)
    assert "nobody is let in before `specd keys allow NAME PUBLIC`" in caplog.text
    allow(path, "alice", ALICE)
    assert known.refresh()
    assert ALICE in known


def test_two_at_once_lose_nothing(path: Path) -> None:
    code = "import sys; from pathlib import Path; from specd.curve import authorized, keys\n" + (
        "for i in range(20): authorized.allow(Path(sys.argv[1]), f'{sys.argv[2]}{i}', keys.draw().public)"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "ab"]
    assert [each.wait(60) for each in both] == [0, 0]
    assert len(Authorized(path)) == 40
    assert [each.name for each in path.parent.iterdir()] == ["authorized"]
