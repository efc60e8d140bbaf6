"""What one peer can do to a daemon and to the trainers beside it: its memory, their rate, their longest wait.

Run with -s, it prints a line an attack. `SPECD_FAULTS` makes the attacks long, and adds unpaced ones.
"""

from __future__ import annotations

import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import attacks
from faults import ASKED, private_directory
from samples import batch
from specd.cli.start import resident_bytes
from specd.client.ask import ask_status
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.protocol.capture import CaptureSpec
from specd.protocol.messages import StatusReport

SECONDS = 10.0 if ASKED else 1.5
PACE = 1000
LONGEST_GAP_S = 1.0
"""Between two batches of an honest trainer, whatever a local process does."""
MOST_GROWTH = 250 << 20
"""Bytes, for 16 connections of which each keeps what it was sent unread."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A daemon in a process of its own."""
    with private_directory() as directory:
        place = f"ipc://{directory}/d.sock"
        command = [sys.executable, "-m", "specd", "start", "--model", "synthetic:hidden=64,layers=8,vocab=65536"]
        command += ["--endpoint", place, "--slots", "12", "--set", "ring.max_sessions=6", "--transports", "shm,bytes"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            assert "ready" in process.stdout.readline()
            with Honest(place) as first:
                first.source.artifact("embedding")  # this target computes it when it is asked for
            yield place
            process.terminate()
            assert process.wait(30) == 0


class Honest:
    """A trainer that takes batches as fast as they come; `gaps` are the seconds between them."""

    def __init__(self, endpoint: str) -> None:
        self.source = Subscriber(
            SubscriberConfig(endpoints=(endpoint,), depth=4, timeout_s=60), CaptureSpec(taps=(1,), dtype="float32")
        )
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


def memory(status: StatusReport) -> list[int]:
    """Resident bytes of control and of the worker."""
    return [resident_bytes({pid}) for pid in (status.pid, status.worker_pid)]


@pytest.mark.parametrize("pace", [PACE, 0] if ASKED else [PACE])
@pytest.mark.parametrize("kind", [kind for kind in attacks.KINDS if kind != "endless"])
def test_a_local_attacker_delays_others_by_moments_only(endpoint: str, kind: str, pace: int) -> None:
    """Multipart messages that never end are left out: libzmq keeps them whole, from whoever is let in."""
    with Honest(endpoint) as honest:
        honest.train(0.3)
        before = memory(ask_status(endpoint, 30))
        alone = honest.train(SECONDS)
        command = [sys.executable, attacks.__file__, endpoint, kind, str(SECONDS + 2), str(pace)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as attacker:
            assert attacker.stdout is not None
            beside = honest.train(SECONDS + 2)
            status = ask_status(endpoint, 30)
            after = memory(status)
            sent = int(attacker.stdout.read())
    share = (len(beside) / sum(beside)) / (len(alone) / sum(alone))
    growth = [now - then for now, then in zip(after, before, strict=True)]
    print(
        f"{kind:>9} at {pace or 'any':>4}/s: {sent:,} messages; rate {share:.2f} of {len(alone) / sum(alone):.0f}/s, "
        f"longest gap {max(beside):.3f} s (alone {max(alone):.3f}), control {growth[0] / 2**20:+.1f} MiB, "
        f"worker {growth[1] / 2**20:+.1f} MiB"
    )
    assert sent > 100
    assert status.state == "serving"
    assert status.counters["worker_restarts"] == 0
    assert max(beside) < LONGEST_GAP_S
    assert max(growth) < MOST_GROWTH


def test_a_thousand_connections_do_not_end_the_daemon(endpoint: str) -> None:
    path = Path(endpoint.removeprefix("ipc://"))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    peers: list[socket.socket] = []
    try:
        with Honest(endpoint) as honest:
            for _ in range(1200):
                peer = socket.socket(socket.AF_UNIX)
                peers.append(peer)
                peer.connect(str(path))
            assert len(honest.train(1.0)) > 10
        limits = Path(f"/proc/{ask_status(endpoint, 30).pid}/limits").read_text()
        found = re.search(r"Max open files +(\d+) +(\d+)", limits)
        assert found is not None
        assert found[1] == found[2], "the soft limit is the hard one"
    finally:
        for peer in peers:
            peer.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with Honest(endpoint) as honest:
        assert honest.train(0.2)
