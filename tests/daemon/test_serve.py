"""Where a daemon may listen, and how it is reached there."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq

from specd.client.ask import dial
from specd.config.settings import DaemonConfig, TargetConfig
from specd.daemon.lock import owned
from specd.daemon.serve import serve
from specd.endpoints import interface
from specd.errors import ConfigError


def refusal(endpoint: str, insecure: bool) -> str:
    """What `specd start` says of an endpoint that it refuses."""
    settings = DaemonConfig(target=TargetConfig(model="none"), endpoint=endpoint, insecure=insecure)
    with pytest.raises(ConfigError) as error:
        serve(settings, lambda status: None)
    return str(error.value)


@pytest.mark.parametrize("insecure", [False, True])
@pytest.mark.parametrize("host", ["*", "0.0.0.0", "0", "[::]", "[::0]"])
def test_every_interface_is_none_that_a_trainer_can_be_told(host: str, insecure: bool) -> None:
    said = refusal(f"tcp://{host}:7070", insecure)
    assert f"tcp://{host}:7070 listens on every interface" in said
    assert "tcp://192.0.2.7:7070" in said
    assert "--insecure" in said


@pytest.mark.parametrize(
    "host", ["192.0.2.7", "[2001:db8::7]", "[fe80::1%lo]", "gpu1", "eth0", "localhost.evil.example"]
)
def test_strangers_are_let_in_only_when_that_was_asked_for(host: str) -> None:
    said = refusal(f"tcp://{host}:7070", insecure=False)
    assert "pass --insecure" in said
    assert "WireGuard" in said
    assert interface(f"tcp://{host}:7070", insecure=True) == host.strip("[]")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "localhost", "[::1]"])
def test_loopback_needs_no_leave(host: str) -> None:
    assert interface(f"tcp://{host}:7070", insecure=False) == host.strip("[]")
    assert interface(f"tcp://{host}:*", insecure=False) == host.strip("[]")


def test_an_endpoint_elsewhere_needs_no_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/nowhere")
    tmp_path.chmod(0o700)
    with owned(f"ipc://{tmp_path}/d.sock") as prefix:
        assert prefix == tmp_path / "d.sock"
    with pytest.raises(ConfigError, match="set XDG_RUNTIME_DIR"), owned("tcp://127.0.0.1:7070"):
        pass


def test_other_endpoints_have_no_interface(tmp_path: Path) -> None:
    assert interface(f"ipc://{tmp_path}/tcp.sock", insecure=False) == ""


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://127.0.0.1", "tcp://::1:7070", "tcp://[::1]", "tcp://[::1:7070", "tcp://[gpu1]:7070", "tcp://:7070",
     "tcp://127.0.0.1:http", "tcp://127.0.0.1:7070/x", "tcp://127.0.0.1:7070\n"],
)  # fmt: skip
@pytest.mark.parametrize("insecure", [False, True])
def test_a_tcp_endpoint_is_an_address_and_a_port(endpoint: str, insecure: bool) -> None:
    assert "expected tcp://ADDRESS:PORT" in refusal(endpoint, insecure)


@pytest.mark.parametrize("address", ["127.0.0.1", "[::1]"])
def test_a_daemon_is_dialled_at_either_kind_of_address(address: str, request: pytest.FixtureRequest) -> None:
    if ":" in address:
        request.getfixturevalue("ipv6")
    with zmq.Context() as context, context.socket(zmq.ROUTER) as daemon:
        daemon.set(zmq.LINGER, 0)
        daemon.set(zmq.IPV6, int(":" in address))
        daemon.set(zmq.RCVTIMEO, 5000)
        daemon.bind(f"tcp://{address}:*")
        with dial(context, daemon.get_string(zmq.LAST_ENDPOINT)) as trainer:
            trainer.send(b"hello")
            assert daemon.recv_multipart()[1] == b"hello"
