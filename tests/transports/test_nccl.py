"""nccl: senders, order, deadlines and faults over a stand-in for NCCL, and the real one between two GPUs."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fake_cuda
from fake_nccl import (
    LIBRARY,
    NCCL,
    REMOTE_ERROR,
    FakeError,
    FakeTransport,
    reset,
    rigged,
    sender_ends,
    stop_half_way,
    until,
)
from specd.endpoints import boot_id
from specd.errors import TransportError, pip_install
from specd.memory.arena import HostArena
from specd.memory.device_arena import DeviceArena
from specd.transports.base import ServerContext, SlotRef
from specd.transports.checks import unwrap, wrap
from specd.transports.nccl import communicator as nccl_comm
from specd.transports.nccl import sender as nccl_sender
from specd.transports.nccl import transport as nccl
from specd.transports.nccl.communicator import Communicator, Library
from specd.transports.nccl.side import Side
from specd.transports.nccl.transport import Nccl, NcclHello, NcclServer
from specd.transports.nccl.watch import Watch
from specd.transports.registry import load
from specd.transports.testing.hosts import Host, LocalHost
from specd.transports.testing.receiver_suite import ReceiverConformance
from specd.transports.testing.spawned import SpawnedHost
from specd.transports.testing.suite import Rig, holds


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """CUDA and NCCL as stand-ins, but where a test asks for GPUs."""
    if request.node.get_closest_marker("gpu") is None:
        fake_cuda.install(monkeypatch)
    with reset():
        yield


class TestOverAStandIn(ReceiverConformance):
    transport = FakeTransport

    def host(self) -> Host:
        return LocalHost(self.transport, self.num_slots, self.slot_bytes, device="cuda:1")


@pytest.fixture
def rig() -> Iterator[Rig]:
    with rigged() as rig:
        yield rig


def test_a_trainer_that_cannot_be_served_is_told_why(rig: Rig) -> None:
    def accept(host: str = boot_id(), uuid: str = "GPU-other", version: int = LIBRARY.version) -> bytes:
        return rig.host.accept(b"one", wrap(NcclHello(host=host, uuid=uuid, version=version)))

    with pytest.raises(TransportError, match=r"share GPU-fake-1.*use --transport cuda_ipc"):
        accept(uuid="GPU-fake-1")
    with pytest.raises(TransportError, match=r"has NCCL 2\.27\.5 and the daemon 2\.28\.9"):
        accept(version=22705)
    with pytest.raises(TransportError, match="on another host and the daemon has no tcp endpoint"):
        accept(host="elsewhere")
    accept()
    with DeviceArena.create(1, 64, "cuda:1", None, False) as arena:
        server = NcclServer(arena, ServerContext(host="127.0.0.1"), LIBRARY)
        server.accept(b"far", wrap(NcclHello(host="elsewhere", uuid="GPU-x", version=22809)))
        server.close()
        with pytest.raises(TransportError, match="is closed"):
            server.accept(b"far", wrap(NcclHello(host="h", uuid="GPU-x", version=22809)))


def test_what_is_missing_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with HostArena.create(1, 64, None) as arena, pytest.raises(TransportError, match="must lie in device memory"):
        Nccl.server(arena, ServerContext())
    with pytest.raises(TransportError, match="states on cpu"):
        Nccl.client("cpu")
    monkeypatch.setitem(sys.modules, "nccl.core", None)
    with pytest.raises(TransportError, match=rf"needs nccl4py.*{re.escape(pip_install('nccl'))}"):
        Nccl.client("cuda:0")


def test_a_libnccl_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_version() -> int:
        raise RuntimeError("no libnccl.so.2")

    core = SimpleNamespace(NcclInvalid=FakeError)
    monkeypatch.setitem(sys.modules, "nccl", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "nccl.core", core)
    monkeypatch.setitem(sys.modules, "nccl.bindings", SimpleNamespace())
    bindings = SimpleNamespace(NCCLError=FakeError, get_version=get_version)
    monkeypatch.setitem(sys.modules, "nccl.bindings.nccl", bindings)
    with pytest.raises(TransportError, match=r"no libnccl\.so\.2; it comes with a CUDA torch"):
        nccl_comm.library()
    bindings.get_version = lambda: 22809
    assert nccl_comm.library() == Library(core, (FakeError, FakeError, RuntimeError), 22809)


def test_a_refill_behind_the_payload_is_stale_and_not_lost(rig: Rig) -> None:
    client = rig.attach()
    rig.host.fill(0, 1, b"old", 4096)
    NCCL.on_payload = lambda: rig.host.begin(0)
    with pytest.raises(TransportError, match="holds generation 0, the lease is for 1") as refusal:
        rig.fetch(client, SlotRef(0, 1, 4096))
    assert not refusal.value.lost
    NCCL.on_payload = lambda: None
    rig.host.fill(0, 2, b"new", 4096)
    assert holds(rig.fetch(client, SlotRef(0, 2, 4096)), b"new")


@pytest.mark.parametrize("asked", [SlotRef(1, 1, 4096), SlotRef(0, 1, 4095)], ids=["another slot", "another size"])
def test_a_fetch_out_of_order_loses_the_client(rig: Rig, asked: SlotRef) -> None:
    client = rig.attach()
    for slot in (0, 1):
        rig.host.fill(slot, 1, b"%d" % slot, 4096)
    rig.host.publish(b"one", SlotRef(0, 1, 4096))
    for _ in range(2):
        with pytest.raises(TransportError) as loss:
            client.fetch(asked, rig.destination(4096), 0.3)
        assert loss.value.lost
    assert holds(rig.fetch(rig.revive(client), SlotRef(1, 1, 4096)), b"1")


def test_a_failed_communicator_is_noticed_at_once(rig: Rig) -> None:
    client = rig.attach()
    rig.host.fill(0, 1, b"", 64)
    threading.Timer(0.05, lambda: setattr(list(NCCL.pairs.values())[-1], "state", REMOTE_ERROR)).start()
    begin = time.monotonic()
    with pytest.raises(TransportError, match="state 6; the peer may be gone") as loss:
        client.fetch(SlotRef(0, 1, 64), rig.destination(64), 60.0)
    assert loss.value.lost
    assert time.monotonic() - begin < 10
    rig.host.publish(b"one", SlotRef(0, 1, 64))  # the sender slept, and notices now
    assert "state 6" in sender_ends(rig)


def test_a_trainer_that_takes_nothing_loses_its_sender_alone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nccl_sender, "SEND_S", 0.3)
    rig.attach(b"one")
    other = rig.attach(b"two")
    rig.host.fill(0, 1, b"both", 4096)
    ref = SlotRef(0, 1, 4096)
    rig.host.publish(b"one", ref)
    while "was not taken within 0.3 s" not in caplog.text:
        assert holds(rig.fetch(other, ref, b"two"), b"both")
    assert "has ended: slot 0 was not taken" in sender_ends(rig)
    assert holds(rig.fetch(rig.attach(b"one"), ref, b"one"), b"both")


def test_what_is_announced_without_being_taken_is_bounded(rig: Rig) -> None:
    client = rig.attach()
    rig.host.fill(0, 1, b"first", 100)
    reason = ""
    for generation in range(1, 50):
        try:
            rig.host.publish(b"one", SlotRef(0, generation, 100))
        except TransportError as error:
            reason = str(error)
            break
    assert reason == "6 transfers wait for 6f6e65, which does not take them"
    into = rig.destination(100)
    client.fetch(SlotRef(0, 1, 100), into, 10.0)
    assert holds(into[:100], b"first")


def test_a_trainer_that_never_attaches_costs_a_while(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_sender, "CONNECT_S", 0.1)
    client = rig.transport.client("cpu")
    offer = rig.host.accept(b"one", client.hello())
    assert "took longer than 0.1 s" in sender_ends(rig)
    NCCL.pairs[unwrap(offer, nccl.NcclOffer, "offer").unique_id].ranks.clear()  # a rank that was aborted is not there
    with pytest.raises(TransportError, match="connecting to the peer over NCCL took longer"):
        client.attach(offer, 0.1)


def test_a_transfer_is_two_kernels_at_the_worker_and_one_at_the_trainer(rig: Rig) -> None:
    client = rig.attach()
    rig.host.fill(0, 1, b"few", 4096)
    NCCL.launches.clear()
    assert holds(rig.fetch(client, SlotRef(0, 1, 4096)), b"few")
    assert NCCL.launches == {0: 2, 1: 1}


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize(
    ("steps", "what"),
    [(0, "connecting to the peer"), (1, "the first message"), (2, "splitting"), (3, "the second message")],
)
def test_a_peer_that_stops_at_any_step_is_left_in_time(
    steps: int, what: str, shares: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nccl_comm, "_quarantine", [])
    NCCL.shares = shares
    unique_id = NCCL.get_unique_id()
    (peer := threading.Thread(target=stop_half_way, args=(unique_id, steps))).start()
    hangs, begin = steps == 3 and not shares, time.monotonic()
    with pytest.raises(TransportError, match="connecting a split" if hangs else what):
        Communicator(LIBRARY, "cuda:0", 1, unique_id, 1, Watch(0.5, threading.Event()))
    assert time.monotonic() - begin < 3
    peer.join()
    # Only where a call never returns is anything left behind: what it uses must not be freed under it.
    assert len(nccl_comm._quarantine) == hangs
    assert ("its stream and buffers are given up" in caplog.text) == hangs
    NCCL.over.set()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("specd-nccl")])


def test_connections_that_are_not_shared_are_made(rig: Rig) -> None:
    NCCL.shares = False
    client = rig.attach()
    rig.host.fill(0, 1, b"own", 4096)
    assert holds(rig.fetch(client, SlotRef(0, 1, 4096)), b"own")


def test_two_leases_on_one_slot_are_two_transfers(rig: Rig) -> None:
    """A trainer that submits the same content twice holds two leases on the slot that has it."""
    client = rig.attach()
    rig.host.fill(0, 1, b"slot", 4096)
    ref = SlotRef(0, 1, 4096)
    for _ in range(2):
        rig.host.publish(b"one", ref)
    for _ in range(2):
        into = rig.destination(4096)
        client.fetch(ref, into, 20.0)
        assert holds(into[:4096], b"slot")


def test_an_idle_sender_sleeps(rig: Rig) -> None:
    client = rig.attach()
    rig.host.fill(0, 1, b"", 100)
    rig.fetch(client, SlotRef(0, 1, 100))
    looks = -1

    def still() -> bool:
        nonlocal looks
        before, looks = looks, NCCL.looks
        return not threading.Event().wait(0.05) and before == looks

    until(still)


def test_drop_and_close_do_not_wait_for_what_is_under_way(rig: Rig) -> None:
    client = rig.attach()
    rig.host.fill(0, 1, b"again", 4096)
    rig.host.publish(b"one", SlotRef(0, 1, 4096))
    begin = time.monotonic()
    rig.host.drop(b"one")
    with pytest.raises(TransportError, match="was not accepted over nccl, or was dropped"):
        rig.host.publish(b"one", SlotRef(0, 1, 4096))
    client.close()
    rig.attach(b"two")
    rig.host.publish(b"two", SlotRef(0, 1, 4096))
    rig.host.close()
    assert time.monotonic() - begin < 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("specd-nccl")]


def test_an_abort_that_hangs_is_left_behind(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nccl_comm, "ABORT_S", 0.1)
    monkeypatch.setattr(nccl_comm, "_quarantine", [])
    client = rig.attach()
    into = rig.destination(100)
    NCCL.hang.set()
    with caplog.at_level(logging.ERROR), pytest.raises(TransportError) as loss:
        client.fetch(SlotRef(0, 1, 100), into, 0.05)
    assert loss.value.lost
    assert "its stream and buffers are given up" in caplog.text
    (kept,) = nccl_comm._quarantine
    assert isinstance(kept, tuple)
    assert [coming.into.data_ptr() for coming in kept[1][1]] == [into.data_ptr()]
    assert holds(rig.fetch(rig.attach(), fill(rig, b"on"), deadline_s=10.0), b"on")


def fill(rig: Rig, nonce: bytes, nbytes: int = 4096) -> SlotRef:
    rig.host.fill(2, 9, nonce, nbytes)
    return SlotRef(2, 9, nbytes)


def test_no_two_communicators_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    handles = itertools.cycle([1, 2, 3])
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: SimpleNamespace(cuda_stream=next(handles)))
    monkeypatch.setattr("specd.transports.nccl.side._POOL", 3)
    sides = [Side("cuda:0"), Side("cuda:0")]
    next(handles)
    sides.append(Side("cuda:0"))
    assert sorted(side.handle for side in sides) == [1, 2, 3]
    with pytest.raises(TransportError, match="no stream for another"):
        Side("cuda:0")
    assert Side("cuda:1").handle
    freed = sides.pop(0).handle
    assert Side("cuda:0").handle == freed


@pytest.mark.gpu(2)
class TestTwoGpus:
    """The real NCCL, between this process and a child."""

    def test_a_killed_worker_costs_the_client_and_no_more(self) -> None:
        host = SpawnedHost("nccl", 3, 64 << 20, device="cuda:1")
        rig = Rig(load("nccl"), "cuda:0", host)
        try:
            client, ref = rig.attach(), SlotRef(0, 1, 64 << 20)
            host.fill(0, 1, b"first", ref.nbytes)
            assert holds(rig.fetch(client, ref), b"first")
            host.kill()
            begin = time.monotonic()
            with pytest.raises(TransportError) as loss:
                client.fetch(ref, rig.destination(ref.nbytes), 2.0)
            assert loss.value.lost
            assert time.monotonic() - begin < 2.0 + nccl_comm.ABORT_S
        finally:
            rig.close()
        rig = Rig(load("nccl"), "cuda:0", SpawnedHost("nccl", 1, 4096, device="cuda:1"))
        try:
            rig.host.fill(0, 1, b"next life", 4096)
            assert holds(rig.fetch(rig.attach(), SlotRef(0, 1, 4096)), b"next life")
        finally:
            rig.close()

    @pytest.mark.parametrize("place", ["beside a process group", "two hosts"])
    def test_verified_bytes(self, place: str) -> None:
        """In a process of its own, which reads NCCL's variables once; `two hosts` have nothing but sockets."""
        apart = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_HOSTID": "one", "NCCL_DEBUG": "INFO"}
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(apart if place == "two hosts" else {})}
        run = subprocess.run(
            [sys.executable, __file__, place], env=env, capture_output=True, text=True, timeout=240, check=False
        )
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
        assert "verified" in run.stdout
        assert ("via NET/" in run.stdout + run.stderr) == (place == "two hosts")


def main(place: str) -> None:
    host = SpawnedHost("nccl", 3, 64 << 20, device="cuda:1", env={"NCCL_HOSTID": "two"} if place == "two hosts" else {})
    with contextlib.closing(Rig(load("nccl"), "cuda:0", host)) as rig:
        reduce: Callable[[], Any] = lambda: None  # noqa: E731
        if place == "beside a process group":
            store: Any = torch.distributed.HashStore()  # type: ignore[attr-defined]  # not exported by name
            torch.distributed.init_process_group(
                "nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda:0")
            )
            ones = torch.ones(1 << 20, device="cuda:0")
            reduce = lambda: torch.distributed.all_reduce(ones)  # noqa: E731
        client = rig.attach()
        for generation, nbytes in enumerate((1, 4097, 1 << 20, (9 << 20) + 12345, 64 << 20), start=1):
            reduce()
            host.fill(0, generation, b"%d" % nbytes, nbytes)
            assert holds(rig.fetch(client, SlotRef(0, generation, nbytes)), b"%d" % nbytes)
        if place == "beside a process group":
            torch.distributed.destroy_process_group()
    print("verified")


if __name__ == "__main__":
    main(sys.argv[1])
