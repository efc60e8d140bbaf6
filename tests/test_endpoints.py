"""Endpoints: which are well-formed, where the default one lies, who may be reached by strangers."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from specd.config.settings import DaemonConfig, TargetConfig
from specd.daemon.serve import serve
from specd.endpoints import host_id, interface, is_far, is_here, resolve_endpoint
from specd.errors import ConfigError
from specd.paths import runtime_dir


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5555", "ipc:///run/a.sock", "inproc://x", "ipc://" + "x" * 107])
def test_endpoints_stay_as_they_are(endpoint: str) -> None:
    assert resolve_endpoint(endpoint) == endpoint


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "default",
        "ipc://",
        "ipc:/run/a",
        "udp://host:1",
        "://x",
        "http://host:80",
        "ipc://" + "ü" * 54,
        "tcp://127.0.0.1",
        "tcp://::1:70",
        "tcp://host:99999",
        "tcp://host:",
    ],
)
def test_malformed_endpoints_are_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="endpoint"):
        resolve_endpoint(endpoint)


def test_the_default_endpoint_is_this_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_dir() == tmp_path / f"specd-{os.getuid()}"
    assert resolve_endpoint("auto") == f"ipc://{tmp_path}/specd-{os.getuid()}/default.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "other"))
    assert runtime_dir().parent == tmp_path / "other"


def test_the_host_id_is_stable_and_fits_its_message() -> None:
    assert host_id() == host_id()
    assert 0 < len(host_id()) <= 200


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
    assert "tcp://192.0.2.7:7070, with --key NAME" in said


@pytest.mark.parametrize(
    "host", ["192.0.2.7", "[2001:db8::7]", "[fe80::1%lo]", "gpu1", "eth0", "localhost.evil.example"]
)
def test_strangers_are_let_in_only_when_that_was_asked_for(host: str) -> None:
    said = refusal(f"tcp://{host}:7070", insecure=False)
    assert "expected a key, with --key NAME (`specd keys new NAME` makes one), or --insecure" in said
    assert interface(f"tcp://{host}:7070", insecure=True) == host.strip("[]")
    assert interface(f"tcp://{host}:7070", insecure=False, keyed=True) == host.strip("[]")
    assert is_far(f"tcp://{host}:7070")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "localhost", "[::1]"])
def test_loopback_needs_no_leave(host: str) -> None:
    assert interface(f"tcp://{host}:7070", insecure=False) == host.strip("[]")
    assert interface(f"tcp://{host}:*", insecure=False) == host.strip("[]")
    assert not is_far(f"tcp://{host}:7070")


def test_keys_are_for_tcp_and_not_beside_insecure(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--insecure serves without keys, and auth names one \(--key\)"):
        interface("tcp://192.0.2.7:7070", insecure=True, keyed=True)
    with pytest.raises(ConfigError, match=r"this user's alone and asks for no key: leave auth \(--key\) out"):
        interface(f"ipc://{tmp_path}/d.sock", insecure=False, keyed=True)


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


def test_an_address_of_this_host_is_here() -> None:
    """Also one that other hosts reach: what the kernel lets nobody bind to is elsewhere."""
    assert all(map(is_here, ("ipc:///run/a.sock", "inproc://x", "tcp://127.0.0.1:70", "tcp://[::1]:70")))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it asks which own address would be used
        own = probe.getsockname()[0]
    assert is_here(f"tcp://{own}:7070")
    assert not is_here("tcp://240.0.0.1:7070")
    assert not is_here("tcp://no.such.host.invalid:7070")
