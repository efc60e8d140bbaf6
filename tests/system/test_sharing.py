"""Trainers that share forwards get, to the bit, what they get alone, for less forwards; and are not slowed by a fault."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import zmq

import members
from exact import daemon_config, serve, write_model
from faults import private_directory
from members import SPECS, Member, follow
from specd.client.ask import ask_status
from specd.config.settings import DaemonConfig, RingConfig, TargetConfig
from specd.daemon.serve import embedded
from specd.errors import RejectedError, TransportError
from specd.protocol.capture import CaptureSpec
from specd.protocol.messages import StatusReport

NUM_LAYERS = 8
FORWARD_S = 0.02
SYNTHETIC = f"synthetic:hidden=32,layers={NUM_LAYERS},vocab=128,ms={FORWARD_S * 1000:g}"
Follow = Callable[..., Member]


def together(following: list[Callable[[], Member]]) -> list[Member]:
    with ThreadPoolExecutor(len(following)) as pool:
        return [each.result() for each in [pool.submit(one) for one in following]]


@contextmanager
def own_process(*extra: str) -> Iterator[str]:
    """A daemon of a synthetic target in a process of its own; yields its endpoint."""
    with private_directory() as place:
        endpoint = f"ipc://{place}/d.sock"
        command = [sys.executable, "-m", "specd", "start", "--model", SYNTHETIC, "--exact", "--endpoint", endpoint]
        command += ["--slots", "12", "--slot-tokens", "64", "--set", "capture.num_taps=6", "--set", "capture.final=true"]
        with subprocess.Popen([*command, *extra], stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert b"ready" in process.stdout.readline()
                yield endpoint
            finally:
                process.terminate()


@pytest.fixture(scope="module")
def daemon() -> Iterator[str]:
    with own_process() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def counters(report: StatusReport) -> dict[str, int]:
    return report.counters


@pytest.mark.parametrize("transport", ["inproc", "shm", "bytes"])
def test_three_specs_get_the_bytes_of_separate_runs(transport: str, daemon: str) -> None:
    count = 20
    ring = RingConfig(slots=12, slot_tokens=64)
    local = DaemonConfig(target=TargetConfig(model=SYNTHETIC, exact=True), ring=ring)
    local = DaemonConfig(target=local.target, ring=ring, capture=type(local.capture)(num_taps=6, final=True))
    with zmq.Context() as context, embedded(local, context) as here:
        endpoint, known = (here.endpoint, context) if transport == "inproc" else (daemon, None)
        status = partial(ask_status, daemon, 10) if known is None else None
        alone = [follow(endpoint, transport, spec, count, context=known) for spec in SPECS]
        before = status().counters["fills"] if status else 0
        meet = threading.Barrier(len(SPECS))
        shared = together([
            partial(follow, endpoint, transport, spec, count, share="s", context=known, meet=meet) for spec in SPECS
        ])  # fmt: skip
        forwards = status().counters["fills"] - before if status else 0
    assert [one.digests for one in shared] == [one.digests for one in alone]
    assert all(len(set(one.digests)) == count for one in alone)
    assert sum(one.stats.shared for one in shared) >= 1.5 * count
    assert sum(one.stats.shared for one in alone) == 0
    if status:
        probes = 8 * len(SPECS)
        assert forwards <= 3 * count - sum(one.stats.shared for one in shared) + probes
