"""Endpoints: where a daemon listens, and whether a peer runs on this host."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

from specd.errors import ConfigError
from specd.paths import runtime_dir

_TCP = re.compile(r"(?:\[[^][]*:[^][]*\]|[^][:/\s]+):([0-9]{1,5}|\*)")


def resolve_endpoint(endpoint: str) -> str:
    """`auto` as this user's default ipc endpoint; anything else unchanged. Raises ConfigError for a malformed one."""
    if endpoint == "auto":
        return f"ipc://{runtime_dir() / 'default.sock'}"
    scheme, sep, rest = endpoint.partition("://")
    if not sep or scheme not in {"ipc", "tcp", "inproc"} or not rest:
        raise ConfigError(f"endpoint {endpoint!r}: expected ipc://PATH or tcp://HOST:PORT")
    if scheme == "ipc" and len(rest.encode()) > 107:
        raise ConfigError(f"endpoint {endpoint!r}: its path has {len(rest.encode())} bytes, a socket path at most 107")
    if scheme == "tcp" and ((parts := _TCP.fullmatch(rest)) is None or int(parts[1].strip("*") or 0) > 65535):
        raise ConfigError(
            f"endpoint {endpoint!r}: expected tcp://ADDRESS:PORT with a port up to 65535, an IPv6 address in brackets, "
            f"as in tcp://[::1]:7070"
        )
    return endpoint


def address(host: str) -> IPv4Address | IPv6Address | None:
    """The IP address in the host part of a tcp endpoint, `*` as 0.0.0.0; None for a name."""
    text = "0.0.0.0" if host == "*" else host.strip("[]")
    with contextlib.suppress(OSError, UnicodeError):
        return ip_address(socket.getaddrinfo(text, None, flags=socket.AI_NUMERICHOST)[0][4][0])
    return None


def is_loopback(host: str) -> bool:
    """Whether the host of a tcp endpoint, a name or an address, is reached from this machine alone."""
    found = address(host)
    return host == "localhost" or (found is not None and found.is_loopback)


def is_far(endpoint: str) -> bool:
    """Whether the daemon at an endpoint may be on another host."""
    return endpoint.startswith("tcp://") and not is_loopback(endpoint.removeprefix("tcp://").rpartition(":")[0])


def is_here(endpoint: str) -> bool:
    """Whether the daemon at an endpoint is on this host: it is no TCP endpoint, or one at an address of this host."""
    if not is_far(endpoint):
        return True
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    with contextlib.suppress(OSError, UnicodeError, ValueError):
        for family, kind, *_, where in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind((where[0], 0, *where[2:]))
                return True
    return False


def interface(endpoint: str, insecure: bool, keyed: bool = False) -> str:
    """The host a tcp endpoint listens on: an address, without brackets, or a name; empty for other endpoints.

    keyed: whether the daemon asks for keys. Raises ConfigError for a wildcard address, for one beyond loopback that is
    neither keyed nor `insecure`, for both at once, and for keys at another endpoint than a tcp one.
    """
    if keyed and insecure:
        raise ConfigError("--insecure serves without keys, and auth names one (--key): give one of the two")
    if not endpoint.startswith("tcp://"):
        if keyed:
            raise ConfigError(f"endpoint {endpoint} is this user's alone and asks for no key: leave auth (--key) out")
        return ""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    host = host.strip("[]")
    found = address(host)
    if found is not None and found.is_unspecified:
        raise ConfigError(
            f"endpoint {endpoint} listens on every interface, and a trainer must be told one address to take batches "
            f"from: name the one it can reach, as in tcp://192.0.2.7:{port}, with --key NAME"
        )
    if not (is_loopback(host) or keyed or insecure):
        raise ConfigError(
            f"endpoint {endpoint} can be reached from other machines: expected a key, with --key NAME (`specd keys new "
            f"NAME` makes one), or --insecure for a network in which you trust everybody, which then reads all states "
            f"unencrypted; trainers on this machine need no tcp endpoint"
        )
    return host


def boot_id() -> str:
    """Identity of the running kernel, empty if unknown; containers of one host share it. Used by transports."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def host_id() -> str:
    """Identity of this kernel and its pid, ipc and /dev/shm namespaces: equal where a process can be watched."""
    spaces = (os.stat(f"/proc/self/ns/{space}").st_ino for space in ("pid", "ipc"))
    return ":".join([boot_id(), *(f"{inode:x}" for inode in spaces), f"{os.stat('/dev/shm').st_dev:x}"])
