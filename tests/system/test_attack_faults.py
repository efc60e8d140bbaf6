"""What one peer can do to a daemon and to the trainers beside it: its memory, their rate, their longest wait.

Run with -s, it prints a line an attack. `SPECD_FAULTS` makes the attacks long, and adds unpaced ones.
"""

from __future__ import annotations

import contextlib
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import attacks
from faults import ASKED, private_directory
from keyed import write_key
from samples import batch
from specd.cli.start import resident_bytes
from specd.client.ask import ask_status
from specd.client.line import Identity
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig, TrainerAuth
from specd.curve import authorized, keys
from specd.protocol.capture import CaptureSpec

SECONDS = 5.0 if ASKED else 1.5
ROUNDS = 2 if ASKED else 1
PACE = 1000
LONGEST_GAP_S = 1.0
"""Between two batches of an honest trainer, whatever a local process does."""
MOST_GROWTH = 250 << 20
"""Bytes, for 16 connections of which each keeps what it was sent unread."""


class Served(NamedTuple):
    """A daemon in a process of its own. config, identity: of an honest trainer. server: its public key."""

    config: SubscriberConfig
    identity: Identity | None = None
    server: str = ""

    @property
    def endpoint(self) -> str:
        return self.config.endpoints[0]

    def memory(self) -> list[int]:
        """Resident bytes of control and of the worker."""
        status = ask_status(self.endpoint, 30, self.identity)
        assert status.state == "serving"
        assert status.counters["worker_restarts"] == 0
        return [resident_bytes({pid}) for pid in (status.pid, status.worker_pid)]


@contextlib.contextmanager
def started(endpoint: str, *options: str) -> Iterator[str]:
    """`specd start`; yields its endpoint."""
    command = [sys.executable, "-m", "specd", "start", "--model", "synthetic:hidden=64,layers=8,vocab=65536", *options]
    command += ["--endpoint", endpoint, "--slots", "12", "--set", "ring.max_sessions=6", "--transports", "shm,bytes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert "ready" in ready
        found = re.search(r"(ipc|tcp)://\S+", ready)
        assert found is not None
        yield found[0].rstrip(",;")
        process.terminate()
        assert process.wait(30) == 0


@pytest.fixture(scope="module")
def local() -> Iterator[Served]:
    """A daemon over ipc."""
    with private_directory() as directory, started(f"ipc://{directory}/d.sock") as endpoint:
        served = Served(SubscriberConfig(endpoints=(endpoint,), depth=4, timeout_s=60))
        with Honest(served) as first:
            first.source.artifact("embedding")  # this target computes it when it is asked for
        yield served


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A daemon over TCP that asks for keys, and a trainer's that is let in."""
    place = tmp_path_factory.mktemp("keys")
    own, alice = keys.draw(), keys.draw()
    authorized.allow(place / "authorized", "alice", alice.public)
    options = ("--key", str(write_key(place / "daemon.key", own)), "--set", f"auth.authorized={place / 'authorized'}")
    with started("tcp://127.0.0.1:*", *options) as endpoint:
        servers = {endpoint: own.public}
        auth = TrainerAuth(key=str(write_key(place / "alice.key", alice)), servers=servers)
        config = SubscriberConfig(endpoints=(endpoint,), depth=4, timeout_s=60, auth=auth)
        yield Served(config, Identity(alice, servers), own.public)


class Honest:
    """A trainer that takes batches as fast as they come."""

    def __init__(self, served: Served) -> None:
        self.source = Subscriber(served.config, CaptureSpec(taps=(1,), dtype="float32"))
        self._index = 0

    def __enter__(self) -> Honest:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()

    def train(self, seconds: float) -> list[float]:
        """The seconds that each batch took, for so long."""
        gaps: list[float] = []
        begun = last = time.monotonic()
        first = self._index
        for delivery in self.source.stream(batch(index) for index in range(first, 1 << 31)):
            now = time.monotonic()
            gaps.append(now - last)
            last = now
            self._index = delivery.batch.index + 1
            if now - begun > seconds:
                break
        return gaps


class Outcome(NamedTuple):
    """share: of the trainer's own rate. longest: between two of its batches. growth: of control and worker, bytes."""

    sent: int
    share: float
    longest: float
    growth: list[int]


def attacked(served: Served, kind: str, pace: int, server: str = "") -> Outcome:
    """What becomes of an honest trainer and of the daemon, measured alone and beside the attack in turn."""
    alone: list[float] = []
    beside: list[float] = []
    sent = 0
    with Honest(served) as honest:
        begun = honest.train(0.5)
        before = after = served.memory()
        for _ in range(ROUNDS):
            alone += honest.train(SECONDS) if ASKED else begun  # a rate that is printed, and no more
            command = [sys.executable, attacks.__file__, served.endpoint, kind, str(SECONDS + 1), str(pace)]
            with subprocess.Popen([*command, *[server] * bool(server)], stdout=subprocess.PIPE, text=True) as attacker:
                honest.train(0.7)  # it starts
                beside += honest.train(SECONDS)
                after = served.memory()
                assert attacker.stdout is not None
                sent += int(attacker.stdout.read())
    rate = len(alone) / sum(alone)
    growth = [now - then for now, then in zip(after, before, strict=True)]
    found = Outcome(sent, len(beside) / sum(beside) / rate, max(beside), growth)
    print(
        f"{kind:>9} at {pace or 'any':>4}/s: {sent:,} messages; rate {found.share:.2f} of {rate:.0f}/s, longest gap "
        f"{found.longest:.3f} s (alone {max(alone):.3f}), control {growth[0] / 2**20:+.1f} MiB, worker "
        f"{growth[1] / 2**20:+.1f} MiB"
    )
    assert sent > 100
    return found


@pytest.mark.parametrize("pace", [PACE, 0] if ASKED else [PACE])
@pytest.mark.parametrize("kind", attacks.LOCAL)
def test_a_local_attacker_delays_others_by_moments_only(local: Served, kind: str, pace: int) -> None:
    found = attacked(local, kind, pace)
    assert found.longest < LONGEST_GAP_S
    assert max(found.growth) < MOST_GROWTH


@pytest.mark.parametrize("pace", [PACE, 0] if ASKED else [PACE])
@pytest.mark.parametrize("kind", attacks.STRANGE if ASKED else ["endless", "knocks"])
def test_a_stranger_costs_a_daemon_with_keys_next_to_nothing(keyed: Served, kind: str, pace: int) -> None:
    found = attacked(keyed, kind, pace, keyed.server)
    assert max(found.growth) < 20 << 20
    assert found.longest < (LONGEST_GAP_S if pace == 0 else 0.5)


def test_a_thousand_connections_do_not_end_the_daemon(local: Served) -> None:
    path = Path(local.endpoint.removeprefix("ipc://"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    peers: list[socket.socket] = []
    try:
        with Honest(local) as honest:
            for _ in range(1200):
                peer = socket.socket(socket.AF_UNIX)
                peers.append(peer)
                peer.connect(str(path))
            assert len(honest.train(1.0)) > 10
        limits = Path(f"/proc/{ask_status(local.endpoint, 30).pid}/limits").read_text()
        found = re.search(r"Max open files +(\d+) +(\d+)", limits)
        assert found is not None
        assert found[1] == found[2], "the soft limit is the hard one"
    finally:
        for peer in peers:
            peer.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with Honest(local) as honest:
        assert honest.train(0.2)
