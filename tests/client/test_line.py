"""A line to a daemon: who the trainer is on it, and what is known of why no answer comes; see daemon/test_gate.py."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import zmq

from keyed import until, write_key
from specd.client.line import SUSPICIOUS, Context, Identity, Line, identity
from specd.config.settings import TrainerAuth
from specd.curve import keys
from specd.errors import ConfigError, RejectedError

ENDPOINT = "tcp://127.0.0.1:7"
SERVER = keys.draw().public


@pytest.fixture
def key(tmp_path: Path) -> str:
    return str(write_key(tmp_path / "me.key", keys.draw()))


def test_settings_without_keys_ask_for_no_identity() -> None:
    assert identity(None, [ENDPOINT]) is None


def test_an_identity_is_a_key_and_those_who_are_trusted(key: str) -> None:
    found = identity(TrainerAuth(key=key, servers={ENDPOINT: SERVER}), [ENDPOINT, "auto", "inproc://x"])
    assert found is not None
    assert found == Identity(keys.load(key), {ENDPOINT: SERVER})
    assert [found.server(each) for each in (ENDPOINT, "ipc:///x")] == [SERVER, ""]


@pytest.mark.parametrize(
    ("servers", "match"),
    [
        ({}, r"no key of the daemon at tcp://127\.0\.0\.1:7 is known"),
        ({"tcp://127.0.0.1:8": SERVER}, r"no key of the daemon at tcp://127\.0\.0\.1:7 is known"),
        ({ENDPOINT: "typo"}, r"auth\.servers: the key of tcp://127\.0\.0\.1:7, 'typo'"),
        ({"nowhere": SERVER}, r"endpoint 'nowhere': expected"),
    ],
)
def test_a_daemon_is_trusted_by_its_key_alone(key: str, servers: dict[str, str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        identity(TrainerAuth(key=key, servers=servers), [ENDPOINT])


def test_nobody_there_is_no_suspicion(context: Context) -> None:
    with Line(context, ENDPOINT) as line:
        assert not line.wait(0.3)
        assert (line.connected, line.problem()) == (False, "")


def test_a_daemon_that_takes_the_connection_is_noticed(context: Context) -> None:
    with context.socket(zmq.ROUTER) as daemon:
        daemon.bind("tcp://127.0.0.1:*")
        with Line(context, daemon.get_string(zmq.LAST_ENDPOINT)) as line:
            until(lambda: line.wait(0.01) or line.connected)


def test_who_lets_go_of_a_line_can_watch_the_socket_at_once(context: Context) -> None:
    for _ in range(20):
        socket = Line(context, ENDPOINT).release()
        socket.get_monitor_socket(zmq.EVENT_DISCONNECTED).close()
        socket.disable_monitor()
        socket.close()


NO_DETAIL, AUTH, PROTOCOL = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
)


def test_only_a_daemon_that_ends_handshake_after_handshake_is_suspicious(context: Context) -> None:
    """One that is killed in a handshake, or one that hangs, has not said anything about keys."""
    with Line(context, ENDPOINT) as line:
        for event, value in ((NO_DETAIL, errno.EPIPE), (zmq.EVENT_CLOSED, 5)) * SUSPICIOUS:
            line.note(event, value)
        for _ in range(SUSPICIOUS):
            line.note(NO_DETAIL, errno.ETIMEDOUT)
        line.note(PROTOCOL, zmq.PROTOCOL_ERROR_ZMTP_UNSPECIFIED)
        assert line.problem() == ""
        for _ in range(SUSPICIOUS):
            line.note(NO_DETAIL, errno.EPIPE)
        assert "if it asks for keys, give --key and --server-key" in line.problem()
        line.note(zmq.EVENT_HANDSHAKE_SUCCEEDED, 0)
        assert line.problem() == ""


def test_a_refusal_that_nobody_expects_is_a_refusal(context: Context) -> None:
    with Line(context, ENDPOINT) as line, pytest.raises(RejectedError, match="refused this key"):
        line.note(AUTH, 400)
