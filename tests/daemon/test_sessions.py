"""Sessions of a real control loop over ipc: watched processes, borrowed slots in quarantine, renewed leases."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from specd.config.settings import DaemonConfig, RingConfig, TargetConfig
from specd.daemon.control import Control
from specd.daemon.supervisor import Supervisor, ThreadHandle
from specd.endpoints import host_id
from specd.protocol import messages as wire
from specd.protocol.capture import CaptureSpec
from specd.transports.base import ServerContext

SPEC = CaptureSpec(taps=(1,), dtype="float32")
BORROWER = """
import sys
from test_sessions import Peer
with Peer(sys.argv[1]) as peer:
    peer.hello()
    ready = peer.probe()
    peer.tell("Borrow", lease=ready.lease)
    peer.tell("Bye")
    peer.ask("Status")
    print(ready.slot, flush=True)
    sys.stdin.read()
"""


class Peer:
    """A minimal trainer."""

    def __init__(self, endpoint: str, routing_id: bytes = b"") -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        if routing_id:
            self._socket.set(zmq.ROUTING_ID, routing_id)
        self._socket.set(zmq.LINGER, 1000)
        self._socket.connect(endpoint)
        self.epoch = b""
        self._seq = 0

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._context.term()

    def tell(self, kind: str, **fields: Any) -> None:
        self._socket.send(wire.encode(getattr(wire, kind)(epoch=self.epoch, **fields)))

    def hear(self, timeout_ms: int = 20_000) -> Any:
        """The next message, None on timeout."""
        return wire.decode_reply(self._socket.recv()) if self._socket.poll(timeout_ms) else None

    def ask(self, kind: str, **fields: Any) -> Any:
        self.tell(kind, **fields)
        answer = self.hear()
        assert answer is not None, f"no answer to {kind}"
        return answer

    def hello(self, pid: int | None = None, **more: Any) -> Any:
        facts = {"name": "peer", "host": host_id(), "pid": os.getpid() if pid is None else pid, "gpus": ("GPU-1",)}
        answer = self.ask("Hello", **facts, transports=("inproc",), spec=SPEC, credits=9, **more)
        self.epoch = answer.epoch
        return answer

    def probe(self) -> Any:
        """READY of a slot of random bytes."""
        self._seq += 1
        return self.ask("Probe", seq=self._seq, nonce=self._seq.to_bytes(8, "big"), nbytes=64)

    def slots_until(self, **wanted: int) -> dict[str, int]:
        """The slots' states once they are as wanted."""
        deadline = time.monotonic() + 20
        while True:
            slots: dict[str, int] = self.ask("Status").slots
            if wanted.items() <= slots.items() or time.monotonic() > deadline:
                return slots


@contextlib.contextmanager
def daemon(directory: Path, slots: int, max_sessions: int, ttl_s: float = 30.0) -> Iterator[tuple[str, Control]]:
    """A control loop whose worker serves, and its endpoint."""
    directory.chmod(0o700)
    endpoint = f"ipc://{directory}/d.sock"
    settings = DaemonConfig(
        target=TargetConfig(model="synthetic:hidden=16,layers=6,vocab=128"),
        ring=RingConfig(slots=slots, max_sessions=max_sessions, slot_tokens=64, lease_ttl_s=ttl_s),
        transports=("inproc",),
    )
    up = threading.Event()
    with zmq.Context() as context:
        supervisor = Supervisor(
            settings,
            lambda worker: ThreadHandle(worker, context),
            f"inproc://{directory.name}",
            ServerContext(),
            context,
        )
        control = Control(settings, (endpoint,), supervisor, context, lambda _: up.set())
        assert control.status().transports == ()
        loop = threading.Thread(target=control.run)
        loop.start()
        try:
            assert up.wait(60)
            yield endpoint, control
        finally:
            control.ending.stop()
            loop.join()
            control.close()


@contextlib.contextmanager
def borrower(endpoint: str) -> Iterator[subprocess.Popen[str]]:
    """A trainer's process that lives on, after its session ended without the release of a slot it borrowed."""
    command = [sys.executable, "-c", BORROWER, endpoint]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip().isdigit()
            yield process
        finally:
            process.kill()


def test_a_borrowed_slot_is_quarantined_until_the_process_is_dead(tmp_path: Path) -> None:
    with daemon(tmp_path, slots=2, max_sessions=1) as (endpoint, _), Peer(endpoint) as peer:
        with borrower(endpoint):
            assert peer.slots_until(quarantined=1) == {"free": 1, "filling": 0, "ready": 0, "quarantined": 1}
            assert peer.hello().slots == 2
            generations = []
            for _ in range(3):
                ready = peer.probe()
                generations.append((ready.slot, ready.generation))
                peer.tell("Release", lease=ready.lease)
            assert len({slot for slot, _ in generations}) == 1, "the other slot was filled though it may be read"
        assert peer.slots_until(quarantined=0)["quarantined"] == 0
        assert {peer.probe().slot, peer.probe().slot} == {0, 1}


def test_a_new_session_waits_while_quarantine_leaves_no_slot_for_it(tmp_path: Path) -> None:
    with daemon(tmp_path, slots=1, max_sessions=1) as (endpoint, _), Peer(endpoint) as peer:
        with borrower(endpoint) as process:
            refusal = peer.hello()
            assert isinstance(refusal, wire.Reject)
            assert refusal.retry_ms > 0
            assert "1 of 1 slots are quarantined" in refusal.reason
            assert str(process.pid) in refusal.reason
        assert peer.slots_until(free=1)["free"] == 1
        assert isinstance(peer.hello(), wire.Welcome)
        with Peer(endpoint) as other:
            assert "all 1 sessions are taken" in other.hello().reason


def test_a_quarantined_slot_does_not_keep_a_daemon_from_draining(tmp_path: Path) -> None:
    with daemon(tmp_path, slots=2, max_sessions=1) as (endpoint, control), Peer(endpoint) as peer, borrower(endpoint):
        assert peer.slots_until(quarantined=1)["quarantined"] == 1
        peer.hello()
        ready = peer.probe()
        control.ending.drain()
        assert peer.slots_until(ready=1)["ready"] == 1
        peer.tell("Release", lease=ready.lease)
        assert isinstance(peer.hear(), wire.Revoke)


def test_what_a_trainer_said_before_it_hung_up_counts(tmp_path: Path) -> None:
    """RELEASE and BYE, sent and followed by the end of the connection: nothing is left borrowed."""
    with daemon(tmp_path, slots=2, max_sessions=2) as (endpoint, _), Peer(endpoint) as watcher:
        for number in range(50):
            with Peer(endpoint) as peer:
                peer.hello()
                ready = peer.probe()
                peer.tell("Borrow", lease=ready.lease)
                peer.tell("Release", lease=ready.lease)
                peer.tell("Bye")
            assert watcher.slots_until(free=2)["quarantined"] == 0, number


def test_a_session_is_that_of_its_connection(tmp_path: Path) -> None:
    """Whoever connects under its routing id when its own connection is gone inherits nothing."""
    with daemon(tmp_path, slots=2, max_sessions=2) as (endpoint, _), Peer(endpoint) as watcher:
        with Peer(endpoint, b"\1victim") as victim:
            victim.hello(pid=0)
            victim.probe()
            (session,) = watcher.ask("Status").sessions
            assert b"victim".hex() not in session.session
        with Peer(endpoint, b"\1victim") as heir:
            heir.epoch = victim.epoch
            assert isinstance(heir.ask("Renew"), wire.Revoke)
        assert watcher.slots_until(free=2)["free"] == 2
        assert not watcher.ask("Status").sessions


def test_a_run_that_never_fits_is_refused_for_good(tmp_path: Path) -> None:
    with daemon(tmp_path, slots=2, max_sessions=2) as (endpoint, _), Peer(endpoint) as peer:
        refusal = peer.hello(run=bytes(16), ranks=3)
        assert (refusal.retry_ms, refusal.loading_ms) == (0, 0)
        assert "takes 2 sessions (ring.max_sessions), and this run has 3 ranks here: " in refusal.reason
        assert refusal.reason.endswith("specd start … --trainers 3`")
        assert isinstance(peer.hello(run=bytes(16), ranks=2), wire.Welcome)


def test_the_first_rank_keeps_places_for_all_of_its_run(tmp_path: Path) -> None:
    """So two runs that do not fit together never hold what the other one waits for."""
    one, two = bytes(16), bytes([1] * 16)
    with contextlib.ExitStack() as stack:
        endpoint, _ = stack.enter_context(daemon(tmp_path, slots=4, max_sessions=4))
        first, second, other, alone = (stack.enter_context(Peer(endpoint)) for _ in range(4))
        assert isinstance(first.hello(run=one, ranks=3), wire.Welcome)
        refusal = other.hello(run=two, ranks=2)
        assert refusal.retry_ms > 0
        assert "3 of 4 sessions" in refusal.reason
        assert "this run needs 2" in refusal.reason
        assert isinstance(alone.hello(), wire.Welcome)
        assert "4 of 4 sessions" in other.hello().reason, "the place of a rank that is still to come"
        assert isinstance(second.hello(run=one, ranks=3), wire.Welcome)
        report = first.ask("Status")
        assert report.max_sessions == 4
        runs = [(session.run, session.ranks) for session in report.sessions]
        assert runs[0] == runs[2] == (runs[0][0], 3), "two ranks, one run"
        assert runs[1] == ("", 1)
        assert one.hex()[:8] not in runs[0][0], "whoever reads it must not be able to join the run"
        for rank in (first, second):
            rank.tell("Bye")
            rank.ask("Status")  # answered once its BYE was heard
        assert isinstance(other.hello(run=two, ranks=2), wire.Welcome)


def test_how_many_lookups_it_takes_until_a_batch_comes_again(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        endpoint, control = stack.enter_context(daemon(tmp_path, slots=4, max_sessions=4))
        one, rank, other = (stack.enter_context(Peer(endpoint)) for _ in range(3))
        sessions = control._sessions
        one.hello(run=bytes(16), ranks=2, epoch_batches=100)
        rank.hello(run=bytes(16), ranks=2, epoch_batches=100)
        assert sessions.lookups(4000) == 200, "ranks share an epoch"
        other.hello(epoch_batches=10)
        assert sessions.lookups(4000) == 220
        other.hello()
        assert sessions.lookups(4000) == 4000
        assert sessions.lookups(40) == 200


def test_a_run_may_have_more_sessions_than_it_said_if_there_is_room(tmp_path: Path) -> None:
    """A rank whose own daemon is down comes here."""
    with contextlib.ExitStack() as stack:
        endpoint, _ = stack.enter_context(daemon(tmp_path, slots=2, max_sessions=2))
        own, guest, third = (stack.enter_context(Peer(endpoint)) for _ in range(3))
        assert isinstance(own.hello(run=bytes(16), ranks=1), wire.Welcome)
        assert isinstance(guest.hello(run=bytes(16), ranks=1), wire.Welcome)
        assert "all 2 sessions are taken" in third.hello(run=bytes(16), ranks=1).reason


def test_a_request_beyond_the_credits_is_refused_before_its_content_is_looked_at(tmp_path: Path) -> None:
    with daemon(tmp_path, slots=2, max_sessions=2) as (endpoint, _), Peer(endpoint) as peer:
        assert peer.hello().credits == 1
        peer.probe()
        forged = {"seq": 7, "batch_id": bytes(16), "tokens": bytes(4), "lengths": b"\1\0\0\0"}
        assert "with 1 requests outstanding and 1 credits" in peer.ask("Submit", **forged).reason
        assert "seq 1 is outstanding already" in peer.ask("Submit", **{**forged, "seq": 1}).reason


@pytest.mark.parametrize("pid", [0, 1])
def test_a_process_the_daemon_cannot_watch_cannot_borrow(tmp_path: Path, pid: int) -> None:
    """No process, and one that the kernel knows is not the sender."""
    with daemon(tmp_path, slots=2, max_sessions=2) as (endpoint, _), Peer(endpoint) as peer:
        peer.hello(pid)
        ready = peer.probe()
        assert "cannot watch the trainer's process" in peer.ask("Borrow", lease=ready.lease).reason
        assert "expected a READY lease of this session" in peer.ask("Borrow", lease=ready.lease + 1).reason
        peer.tell("Bye")
        assert peer.slots_until(free=2)["quarantined"] == 0


def test_status_tells_the_gpus_and_what_is_served(tmp_path: Path) -> None:
    with daemon(tmp_path, slots=2, max_sessions=2) as (endpoint, _), Peer(endpoint) as peer:
        peer.hello()
        status = peer.ask("Status")
        assert status.transports == ("inproc",)
        assert [session.gpus for session in status.sessions] == [("GPU-1",)]


@pytest.mark.parametrize("kind", ["RecvReady", "Borrow"])
def test_being_ready_to_receive_and_borrowing_renew_the_lease(tmp_path: Path, kind: str) -> None:
    with daemon(tmp_path, slots=2, max_sessions=2, ttl_s=1.0) as (endpoint, _), Peer(endpoint) as peer:
        peer.hello()
        assert isinstance(peer.ask("Attach", transport="inproc"), wire.Offer)
        lease = peer.probe().lease
        for _ in range(5):
            peer.tell(kind, lease=lease)
            assert peer.hear(400) is None
        assert isinstance(peer.hear(), wire.Revoke)
