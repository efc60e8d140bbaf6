"""Memory stays flat: control and subscriber hold no more after 10,000 batches than after the first thousands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from samples import batch
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.protocol.capture import CaptureSpec

NUM_BATCHES = 10_000
WARM_UP = 3_000
GROWTH_KIB = 2048
"""What an allocator may take later; one byte a batch that is never freed, times a few hundred, is more."""


def resident_kib(pid: int | str) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize("transport", ["shm", "bytes"])
def test_resident_memory_is_flat(transport: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    endpoint = f"ipc://{tmp_path}/d.sock"
    command = [sys.executable, "-m", "specd", "start", "--model", "synthetic:hidden=16,layers=6,vocab=128"]
    command += ["--endpoint", endpoint, "--slot-tokens", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as daemon:
        try:
            assert daemon.stdout is not None
            assert b"ready" in daemon.stdout.readline()
            config = SubscriberConfig(endpoints=(endpoint,), transport=transport, depth=4)
            with Subscriber(config, CaptureSpec(taps=(1, 3), dtype="float32")) as source:
                count, control, subscriber = 0, 0, 0
                for count, _ in enumerate(source.stream(batch(i % 64) for i in range(NUM_BATCHES)), 1):
                    if count == WARM_UP:
                        control, subscriber = resident_kib(daemon.pid), resident_kib("self")
                assert count == NUM_BATCHES
                assert resident_kib(daemon.pid) - control < GROWTH_KIB
                assert resident_kib("self") - subscriber < GROWTH_KIB
        finally:
            daemon.terminate()
    assert daemon.returncode == 0
