"""The front: what one peer can make the daemon hold or do, and that every batch that fits a slot can be asked for."""

from __future__ import annotations

import contextlib
import itertools
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from specd.config.settings import CaptureConfig, DaemonConfig, RingConfig, TargetConfig
from specd.daemon import front as module
from specd.daemon.front import LISTEN_S, Front, largest_request
from specd.errors import ConfigError, DaemonError
from specd.protocol import limits
from specd.protocol import messages as wire
from specd.protocol.batch import slot_bytes, slot_layout
from specd.protocol.capture import CaptureSpec, StateDtype

TARGET = TargetConfig(model="synthetic:hidden=16,layers=6,vocab=128")
SETTINGS = DaemonConfig(target=TARGET, ring=RingConfig(slots=4, max_sessions=2, slot_tokens=64))
LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (200, {hard}))
from specd.daemon.front import raise_file_limit
raise_file_limit({sessions})
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def front(context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path) -> Iterator[Front]:
    front = Front(SETTINGS, (f"ipc://{tmp_path}/s",), context, time.monotonic)
    yield front
    front.close(linger_ms=0)


def dealer(context: zmq.Context[zmq.Socket[bytes]], front: Front) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDTIMEO, 100)
    socket.connect(front.endpoints[0])
    return socket


def test_a_flood_is_listened_to_for_a_moment_at_a_time(context: zmq.Context[zmq.Socket[bytes]], front: Front) -> None:
    done = threading.Event()

    def flood() -> None:
        with dealer(context, front) as socket:
            while not done.is_set():
                try:
                    socket.send(b"x" * 1000)
                except zmq.Again:
                    continue

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        poller = zmq.Poller()
        front.register(poller)
        turns: list[tuple[float, int]] = []
        while len(turns) < 20:
            assert poller.poll(10_000)
            front.lost()  # what came and went wakes the loop, too
            began = time.monotonic()
            heard = sum(1 for _ in front.messages())
            turns.append((time.monotonic() - began, heard))
    finally:
        done.set()
        thread.join()
    assert sorted(took for took, _ in turns)[10] < 5 * LISTEN_S
    assert sum(heard for _, heard in turns) > 100


@pytest.mark.parametrize("slots", [4, 128])
def test_a_peer_that_does_not_read_is_told_of_not_waited_for(
    slots: int, context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path
) -> None:
    """It is sent an announcement for each slot first: all of its batches may come at once."""
    settings = msgspec.structs.replace(SETTINGS, ring=RingConfig(slots=slots, max_sessions=2, slot_tokens=64))
    front = Front(settings, (f"ipc://{tmp_path}/s",), context, time.monotonic)
    with contextlib.closing(front), dealer(context, front) as socket:
        socket.set(zmq.RCVHWM, 1)
        socket.send(b"hi")
        poller = zmq.Poller()
        front.register(poller)
        heard: list[bytes] = []
        while not heard:
            assert poller.poll(10_000)
            heard = [key for key, _, _ in front.messages()]
        message = wire.Artifact(name="lm_head", offset=0, data=bytes(limits.ARTIFACT_CHUNK_BYTES))
        sent = next(number for number in itertools.count() if front.send(heard[0], message))
        assert front.send(heard[0], message) == "it does not read its messages"
        assert slots < sent < 2 * slots + 100
        assert front.send(b"nobody", wire.Renewed()) == "its connection is gone"


def test_a_peer_that_has_just_read_is_sent_more_at_once(context: zmq.Context[zmq.Socket[bytes]], front: Front) -> None:
    """As many messages as may wait for it, over and over, each round as soon as it has read the one before."""
    with dealer(context, front) as peer:
        peer.send(wire.encode(wire.Status()))
        poller = zmq.Poller()
        front.register(poller)
        messages: list[tuple[bytes, object, object]] = []
        while not messages:
            assert poller.poll(20_000)
            messages = list(front.messages())
        key = messages[0][0]
        for turn in range(200):
            for _ in range(module.UNREAD + SETTINGS.ring.slots):
                assert front.send(key, wire.Renewed()) == "", turn
            for _ in range(module.UNREAD + SETTINGS.ring.slots):
                assert peer.poll(20_000)
                peer.recv()


@pytest.mark.parametrize("wanted", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto", "float8_e4m3fn"])
@pytest.mark.parametrize("capture", [(5, False), (1, True), (0, True)])
def test_every_batch_that_fits_a_slot_can_be_asked_for(
    dtype: str, capture: tuple[int, bool], wanted: StateDtype
) -> None:
    taps, final = capture
    hidden = 64
    settings = DaemonConfig(
        target=TARGET,
        ring=RingConfig(slot_tokens=512),
        capture=CaptureConfig(num_taps=taps, final=final, dtype=dtype),  # type: ignore[arg-type]
    )
    stored = CaptureSpec(taps=tuple(range(taps)), final=final, dtype="float32" if dtype == "auto" else dtype)  # type: ignore[arg-type]
    room = slot_bytes(stored, hidden, 512)
    small = CaptureSpec(taps=(1,), dtype=wanted)
    most = room // small.bytes_per_token(hidden)
    while slot_layout(small, hidden, most).nbytes > room:  # scales begin on a page
        most -= 1
    ones = b"\1\0\0\0" * most
    asked = wire.Submit(epoch=bytes(16), seq=2**64 - 1, batch_id=bytes(16), tokens=ones, lengths=ones)
    assert len(wire.encode(asked)) <= largest_request(settings)
    images = msgspec.structs.replace(settings, ring=RingConfig(slot_tokens=512, payload_mib=1))
    many = (bytes(300),) * (2**20 // 300)  # of a length that takes three bytes
    brought = msgspec.structs.replace(asked, payloads=many + (b"",) * (most - len(many)))
    assert largest_request(settings) < len(wire.encode(brought)) <= largest_request(images)


def test_an_endpoint_in_use_is_named(context: zmq.Context[zmq.Socket[bytes]]) -> None:
    with context.socket(zmq.ROUTER) as taken:
        taken.bind("tcp://127.0.0.1:*")
        endpoint = taken.get_string(zmq.LAST_ENDPOINT)
        with pytest.raises(DaemonError, match=f"cannot listen on {endpoint}: Address already in use"):
            Front(SETTINGS, (endpoint,), context, time.monotonic)


def test_silent_connections_are_closed_when_there_are_many(
    context: zmq.Context[zmq.Socket[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_file_limit", lambda: 0)
    monkeypatch.setattr(module, "FEW_CONNECTIONS", 3)
    front = Front(SETTINGS, (f"ipc://{tmp_path}/s",), context, time.monotonic)
    peers = [dealer(context, front) for _ in range(5)]
    for peer in peers:
        peer.set(zmq.RECONNECT_IVL, -1)
        peer.send(b"hi")
    deadline = time.monotonic() + 10
    heard: list[object] = []
    while len(heard) < 5 and time.monotonic() < deadline:
        heard += [connection for _, connection, _ in front.messages()]
    assert len(front) == 5
    assert front.tidy(set()) == 2
    assert front.tidy(set()) == 0
    assert len(front) == 3
    for peer in peers:
        peer.close()
    front.close(linger_ms=0)


def limit(sessions: int, hard: int) -> subprocess.CompletedProcess[str]:
    code = LIMIT.format(hard=hard, sessions=sessions)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_limit_of_open_files_is_raised_and_checked() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    assert limit(4, most).stdout == f"{most}\n"
    refused = limit(100, 300).stderr
    assert (
        f"{ConfigError.__name__}: ring.max_sessions=100 needs 328 open files, and this process may have 300" in refused
    )
