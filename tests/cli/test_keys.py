"""`specd keys` in a pipe, and a daemon and a trainer that find each other by what it printed."""

from __future__ import annotations

import json
import os
import select
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemons import specd_command
from faults import TARGET, write_data
from specd.cli.main import run
from specd.cli.settings import servers_of
from specd.curve import keys
from specd.errors import ConfigError

MISSING = keys.draw().public
TINY = (
    "draft.num_layers=1", "draft.num_taps=2", "draft.block_size=4", "draft.num_anchors=4", "draft.mask_token_id=255",
    "draft.attention=sdpa", "data.batch_tokens=60", "data.max_length=40", "train.dtype=float32", "train.threads=1",
)  # fmt: skip
"""Settings of a draft that takes no time."""
DAEMON = ["start", "--model", TARGET, "--slots", "4", "--slot-tokens", "64", "--transports", "bytes", "--detach"]
DAEMON += ["--endpoint", "tcp://127.0.0.1:*"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "specd"


def test_new_prints_the_public_half_alone_on_standard_output(home: Path) -> None:
    done = specd_command("keys", "new", "gpu1")
    pair = keys.load("gpu1")
    assert (done.returncode, done.stdout) == (0, f"{pair.public}\n")
    assert str(home / "gpu1.key") in done.stderr
    assert pair.secret not in done.stderr
    again = specd_command("keys", "new", "gpu1")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("specd: error: key 'gpu1' exists in ")
    assert keys.load("gpu1") == pair


def test_allow_list_and_revoke_are_whole_lines_in_a_pipe(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    _, mine = keys.create("gpu1")
    other = keys.draw().public
    assert run(["keys", "allow", "trainer1", "--", other]) == 0  # a key that was not made here may begin with a sign
    assert run(["keys", "allow", "trainer1", "--", other]) == 0
    assert run(["keys", "list"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in said[:2]] == ["trainer1 is let in", "trainer1 is let in already"]
    assert said[2:] == [f"own\tgpu1\t{mine.public}", f"lets in\ttrainer1\t{other}"]
    assert stat.S_IMODE((home / "authorized").stat().st_mode) == 0o600
    assert run(["keys", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "own": {"gpu1": mine.public},
        "let_in": {"trainer1": other},
        "authorized": str(home / "authorized"),
        "problems": [],
    }
    assert run(["keys", "revoke", "trainer1"]) == 0
    assert run(["keys", "revoke", "trainer1"]) == 2
    assert "it lets in nobody" in capsys.readouterr().err


def test_list_tells_of_what_cannot_be_used(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", "list"]) == 0
    assert capsys.readouterr().err == "no keys yet: `specd keys new NAME` makes one\n"
    path, _ = keys.create("gpu1")
    path.chmod(0o644)
    (home / "authorized").write_text("alice typo\n")
    assert run(["keys", "list"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("own\tgpu1\tunusable: key file ")
    assert "the key of alice, 'typo'" in said.err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["keys", "allow", "trainer1", "short"], "public key 'short' of 5 characters"),
        (["keys", "new", "../x"], "letters, digits"),
        (["status", "-e", "tcp://127.0.0.1:7", "--server-key", MISSING], "--server-key is given without --key"),
        (["status", "-e", "tcp://127.0.0.1:7", "--key", "none"], r"specd keys new none"),
        (["status", "--key", "none", "--server-key", MISSING], "1 × --server-key for 0 TCP endpoints"),
        (["start", "-m", "synthetic:hidden=8", "-e", "tcp://192.0.2.7:1", "--key", "none"], "specd keys new none"),
        (["start", "-m", "synthetic:hidden=8", "--key", "none"], "asks for no key"),
        (["train", "dflash", "--key", "none", "--server-key", MISSING], "1 × --server-key for 0 TCP endpoints"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert match in line


def test_each_daemon_has_its_key_or_all_have_one() -> None:
    one, two, local = "tcp://a:1", "tcp://b:1", "ipc:///x"
    assert servers_of([one, local, two], ["A", "B"]) == {one: "A", two: "B"}
    assert servers_of([one, local, two], ["A"]) == {one: "A", two: "A"}
    assert servers_of([one], []) == {}
    with pytest.raises(ConfigError, match="3 × --server-key for 2 TCP endpoints"):
        servers_of([one, two], ["A", "B", "C"])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory of the test's own, whose daemon is ended."""
    place = Path(f"/tmp/sk-{os.getpid()}")
    place.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    yield place
    for log in place.rglob("*.log"):
        log.unlink()
    for directory in sorted(place.rglob("*"), reverse=True):
        directory.rmdir()
    place.rmdir()


def test_a_daemon_and_those_who_train_and_ask_over_tcp(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As docs/security.md goes through it, on one host; no secret is in a command line or in a log."""
    (_, server), (_, mine) = keys.create("gpu1"), keys.create("trainer1")
    assert run(["keys", "allow", "trainer1", mine.public]) == 0
    started = specd_command(*DAEMON, "--key", "gpu1")
    assert started.returncode == 0, started.stderr
    endpoint = started.stdout.split("specd ready at ")[1].split(" ")[0]
    pid = int(started.stdout.split("pid ")[1].split(" ")[0])
    try:
        logs = [path.read_bytes() for path in place.rglob("*.log")]
        assert any(server.public.encode() in log for log in logs)
        commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        assert any(endpoint.rpartition(":")[0].encode() in command for command in commands), "the daemon's is not there"
        for pair in (server, mine):
            assert not any(pair.secret.encode() in text for text in (*commands, *logs))
        ask = ["status", "--endpoint", endpoint, "--json", "--timeout", "20"]
        capsys.readouterr()
        assert run([*ask, "--key", "trainer1", "--server-key", server.public]) == 0
        assert json.loads(capsys.readouterr().out)["pid"] == pid
        settings = [f"--set={key}" for key in TINY]
        train = ["train", "dflash", "--endpoint", endpoint, "--output", str(tmp_path / "run"), "--max-steps", "2"]
        train += ["--data", str(write_data(tmp_path / "data.jsonl")), *settings]
        assert run([*train, "--key", "trainer1", "--server-key", server.public]) == 0
        facts = json.loads((tmp_path / "run" / "run.json").read_bytes())
        assert facts["config"]["subscriber"]["auth"] == {"key": "trainer1", "servers": {endpoint: server.public}}
        capsys.readouterr()
        assert run(ask) == 1
        assert capsys.readouterr().err.startswith(f"specd: error: the daemon at {endpoint} asks for keys")
        assert run(["keys", "revoke", "trainer1"]) == 0
        assert run([*ask, "--key", "trainer1", "--server-key", server.public]) == 1
        assert capsys.readouterr().err.startswith(f"specd: error: the daemon at {endpoint} refused this key")
    finally:
        watch = os.pidfd_open(pid)
        os.kill(pid, signal.SIGTERM)
        assert select.select([watch], [], [], 20)[0]
        os.close(watch)
