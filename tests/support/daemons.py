"""Daemons of the command line's tests: one that answers with a fixed report, and commands as processes of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import zmq

import specd
from specd.protocol.contract import RingInfo, TargetContract
from specd.protocol.messages import SessionStatus, Status, StatusReport, decode_request, encode

CONTRACT = TargetContract(
    model="tiny",
    model_type="llama",
    hidden_size=64,
    num_layers=4,
    vocab_size=512,
    dtype="float32",
    weights="feed",
)


REPORT = StatusReport(
    epoch=bytes(range(16)),
    state="serving",
    version=specd.__version__,
    pid=os.getpid(),
    worker_pid=0,
    uptime_s=12.0,
    contract=CONTRACT,
    ring=RingInfo(num_slots=8, slot_bytes=5 << 20, slot_tokens=4096),
    slots={"free": 5, "filling": 0, "ready": 2, "quarantined": 1},
    queued=1,
    sessions=(
        SessionStatus(
            session="ab" * 16,
            name="trainer-1",
            transport="shm",
            gpus=("GPU-5e7a1c90-0000",),
            credits=3,
            outstanding=2,
            leases=1,
            batches=1234,
            nbytes=5 << 30,
            age_s=7.0,
            tokens=3_791_040,
        ),
    ),
    counters={"batches": 1234},
    endpoints=("ipc:///tmp/x/daemon.sock",),
    transports=("shm", "bytes"),
)


@contextlib.contextmanager
def answering(endpoint: str, report: StatusReport) -> Iterator[None]:
    """A two-line daemon that answers every question with `report`."""
    stop = threading.Event()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(endpoint)

        def answer() -> None:
            while not stop.is_set():
                if socket.poll(50):
                    key, frame = socket.recv_multipart()
                    assert isinstance(decode_request(frame), Status)
                    socket.send_multipart([key, encode(report)])

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def specd_command(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run `specd …` as a process of its own."""
    command = [sys.executable, "-m", "specd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def synthetic(endpoint: str) -> list[str]:
    """Arguments that start a small detached daemon without a model."""
    shape = ["--model", "synthetic:hidden=8,layers=8", "--slots", "4", "--slot-tokens", "64"]
    return ["start", *shape, "--endpoint", endpoint, "--detach"]
