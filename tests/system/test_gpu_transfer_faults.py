"""Either side of a transfer between GPUs is killed in mid-transfer: the other goes on, with all of its memory.

Each test does its faults twice, or as often as SPECD_FAULTS says; several processes start at the same time, and are
killed one after the other.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from faults import ASKED, SEED
from levels import Levels
from specd.errors import TransportError
from specd.transports.base import SlotRef
from specd.transports.registry import load
from specd.transports.testing.rig import Rig, holds
from specd.transports.testing.spawned import SpawnedHost

FIRST, SECOND = "cuda:0", "cuda:1"
PULLED = 128 << 20
"""Bytes of the transfers that are interrupted: back to back, a kill at a random moment then falls into one."""
SLACK = 96 << 20
"""Bytes a device's level may differ by: less than one slot."""
LIMIT_S = 20.0
"""The surviving side is served again within this."""
AT_ONCE = 10
REF = SlotRef(0, 1, PULLED)
PULLER = """
import sys, torch
from specd.transports.base import SlotRef; from specd.transports.registry import load
name, device, nbytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
client = load(name).client(device)
print(client.hello().hex(), flush=True)
client.attach(bytes.fromhex(sys.stdin.readline()), 20.0)
into = torch.zeros(nbytes, dtype=torch.uint8, device=device)
torch.cuda.synchronize(device)
while True:
    print("ready", flush=True)
    client.fetch(SlotRef(0, 1, nbytes), into, 10.0)
"""
"""A trainer in a process of its own: says hello, reads the offer, and fetches slot 0 for ever."""

each_way = pytest.mark.parametrize(
    ("name", "device"),
    [
        pytest.param("cuda_ipc", FIRST, id="cuda_ipc-same_gpu", marks=pytest.mark.gpu(1)),
        pytest.param("cuda_ipc", SECOND, id="cuda_ipc-peer", marks=pytest.mark.gpu(2)),
        pytest.param("nccl", SECOND, id="nccl", marks=pytest.mark.gpu(2)),
    ],
)


def rounds() -> list[int]:
    """How many processes each round kills; the level is taken after the first, which loads everything lazy."""
    left = (ASKED or 2) - 1
    return [1, *(min(AT_ONCE, left - begin) for begin in range(0, left, AT_ONCE))]


@each_way
def test_trainers_killed_in_mid_transfer_cost_the_worker_nothing(name: str, device: str) -> None:
    host = SpawnedHost(name, 1, PULLED, device=FIRST)
    rig, rng, level = Rig(load(name), device, host), random.Random(SEED), None
    try:
        host.fill(0, 1, b"pulled", PULLED)
        for number in rounds():
            with pullers(name, device, number) as started:
                for puller in started:
                    pull_and_be_killed(name, host, puller, rng)
            level = level or Levels([FIRST, device], SLACK)
        assert level is not None
        level.check()
        begin = time.monotonic()
        assert holds(rig.fetch(rig.attach(), REF), b"pulled"), f"seed {SEED}"
        assert time.monotonic() - begin < LIMIT_S
    finally:
        rig.close()


@contextlib.contextmanager
def pullers(name: str, device: str, number: int) -> Iterator[list[subprocess.Popen[str]]]:
    """`number` trainers, started at the same time; each waits for its offer."""
    command = [sys.executable, "-c", PULLER, name, device, str(PULLED)]
    with contextlib.ExitStack() as running:
        started = []
        for _ in range(number):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            running.enter_context(process)
            running.callback(process.kill)
            started.append(process)
        yield started


def pull_and_be_killed(name: str, host: SpawnedHost, puller: subprocess.Popen[str], rng: random.Random) -> None:
    """Let a trainer fetch one slot over and over, and kill it in mid-transfer."""
    assert puller.stdin is not None
    assert puller.stdout is not None
    offer = host.accept(b"pull", bytes.fromhex(puller.stdout.readline()))
    puller.stdin.write(offer.hex() + "\n")
    puller.stdin.flush()
    for _ in range(rng.randint(5, 50)):
        assert puller.stdout.readline() == "ready\n", "the trainer ended by itself"
        if name == "nccl":
            host.publish(b"pull", REF)
    time.sleep(rng.uniform(0, 0.0005))
    puller.kill()
    puller.wait()
    host.drop(b"pull")


@each_way
def test_workers_killed_in_mid_transfer_leave_the_trainer_its_device(name: str, device: str) -> None:
    """Every fetch gives the right bytes or an error, in bounded time; the next worker is served from as before."""
    rng, level = random.Random(SEED), None
    for number in rounds():
        with hosts(name, number) as started:
            for host in started:
                pull_until_it_is_killed(name, host, device, rng)
        level = level or Levels([FIRST, device], SLACK)
    assert level is not None
    level.check()


@contextlib.contextmanager
def hosts(name: str, number: int) -> Iterator[list[SpawnedHost]]:
    """`number` hosts with a full slot, started at the same time."""

    def start(_: int) -> SpawnedHost:
        host = SpawnedHost(name, 1, PULLED, device=FIRST)
        running.callback(host.close)
        host.fill(0, 1, b"pulled", PULLED)
        return host

    with contextlib.ExitStack() as running:
        with ThreadPoolExecutor(number) as pool:
            started = list(pool.map(start, range(number)))
        yield started


def pull_until_it_is_killed(name: str, host: SpawnedHost, device: str, rng: random.Random) -> None:
    """Fetch one slot over and over, until its host is killed in mid-transfer; then check the trainer's side."""
    rig = Rig(load(name), device, host)
    killed = threading.Event()

    def kill() -> None:
        killed.set()
        os.kill(host.pid, signal.SIGKILL)

    killer = threading.Timer(rng.uniform(0.05, 0.2), kill)
    try:
        client = rig.attach()
        into = rig.destination(PULLED)
        transfers, begin = 0, time.monotonic()
        killer.start()
        try:
            while not killed.is_set() or name == "nccl":
                rig.publish(b"one", REF)
                client.fetch(REF, into, 5.0)
                transfers += 1
        except TransportError:
            if not killed.is_set():
                raise
        killer.join()
        assert time.monotonic() - begin < LIMIT_S
        assert transfers > 1
        if name == "cuda_ipc":  # what is mapped can still be read, and still says what it is
            client.fetch(REF, into, 5.0)
            assert holds(into[:PULLED], b"pulled"), f"seed {SEED}"
        assert float(torch.ones(1000, device=device).sum()) == 1000.0
    finally:
        killer.cancel()
        rig.close()
