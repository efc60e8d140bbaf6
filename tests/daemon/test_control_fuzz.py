"""A hostile peer: 100,000 broken, forged, replayed and deep messages, while another trainer keeps being served.

SPECD_FAULTS makes it 800,000.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import msgspec
import zmq

from faults import ASKED
from samples import batch
from specd.client.subscriber import Subscriber
from specd.config.settings import DaemonConfig, RingConfig, SubscriberConfig, TargetConfig
from specd.daemon.control import Control
from specd.daemon.serve import embedded
from specd.daemon.supervisor import Supervisor, ThreadHandle
from specd.endpoints import host_id
from specd.protocol import limits
from specd.protocol import messages as wire
from specd.protocol.capture import CaptureSpec
from specd.transports.base import ServerContext

SEED = 20261123
NUM_MESSAGES = 800_000 if ASKED else 100_000
SPEC = CaptureSpec(taps=(1, 3), dtype="float32")
DEEP = (b"\x91", b"\x81\xa1a", b"\xdd\x00\x00\x00\x01", b"\x82\xa4type\xa5renew\xa5epoch")
"""Each opens a level of nesting."""
ODD: tuple[Any, ...] = (
    -1, 0, 1, 7, 2**31, 2**63, 2**64 - 1, 1.5, float("nan"), None, True, "", "x" * 300, b"", b"\0" * 16, b"\xff" * 17,
    [], [1, 2], [-1], {}, {"a": 1}, "shm", "../../etc/passwd", "embedding", "lm_head",
)  # fmt: skip


def templates(epoch: bytes) -> list[dict[str, Any]]:
    """A well-formed message of every kind a trainer may send, and some that only a daemon may."""
    one = batch(0)
    messages: list[wire.Message] = [
        wire.Hello(epoch=epoch, name="fuzz", host=host_id(), pid=0, transports=("inproc",), spec=SPEC, credits=3),
        wire.Attach(epoch=epoch, transport="inproc", hello=b""),
        wire.Probe(epoch=epoch, seq=1, nonce=b"n" * 16, nbytes=64),
        wire.Submit(epoch=epoch, seq=2, batch_id=b"i" * 16, tokens=one.tokens.tobytes(), lengths=one.lengths.tobytes()),
        wire.RecvReady(epoch=epoch, lease=1),
        wire.Borrow(epoch=epoch, lease=1),
        wire.Release(epoch=epoch, lease=1),
        wire.Renew(epoch=epoch),
        wire.Fetch(epoch=epoch, name="embedding", offset=0, length=128),
        wire.Status(epoch=epoch),
        wire.Bye(epoch=epoch),
        wire.Error(epoch=epoch, reason="no"),
        wire.Renewed(epoch=epoch),
        wire.Revoke(epoch=epoch, reason="no"),
    ]
    return [msgspec.msgpack.decode(wire.encode(message)[1:]) for message in messages]


def mutate(rng: random.Random, forms: list[dict[str, Any]], sent: list[bytes]) -> list[bytes]:
    """The frames of one hostile message."""
    kind = rng.random()
    if kind < 0.1 and sent:
        return [rng.choice(sent)]  # a replay
    form = dict(rng.choice(forms))
    if kind < 0.6:
        key = rng.choice(list(form))
        if rng.random() < 0.15:
            form[f"{key}x"] = rng.choice(ODD)
        elif rng.random() < 0.1:
            del form[key]
        elif key != "type":
            form[key] = rng.choice(ODD)
    frame = bytearray(bytes((wire.VERSION,)) + msgspec.msgpack.encode(form))
    if 0.6 <= kind < 0.8:
        for _ in range(rng.randint(1, 4)):
            frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
    elif 0.8 <= kind < 0.9:
        frame = frame[: rng.randrange(len(frame))]
    elif 0.9 <= kind < 0.95:
        frame += rng.randbytes(rng.randrange(1, 64))
    elif 0.95 <= kind < 0.97:
        frame = frame[:1] + rng.choice(DEEP) * rng.choice((50, 2000, 30_000))
    elif kind >= 0.97:
        frame = bytearray(rng.randbytes(rng.randrange(0, 256)))
    return [bytes(frame)] if rng.random() > 0.02 else [bytes(frame), b"", b"more"]


def test_hostile_messages_neither_crash_nor_wedge_the_daemon() -> None:
    settings = DaemonConfig(
        target=TargetConfig(model="synthetic:hidden=16,layers=6,vocab=128"),
        ring=RingConfig(slots=6, max_sessions=4, slot_tokens=64),
    )
    rng = random.Random(SEED)
    delivered: list[int] = []
    with embedded(settings) as host:
        config = SubscriberConfig(endpoints=(host.endpoint,), depth=2, timeout_s=60)
        done = threading.Event()

        def train() -> None:
            with Subscriber(config, SPEC, context=host.context, name="honest") as source:
                index = 0
                while not done.is_set():
                    delivered.extend(d.batch.index for d in source.stream(batch(i) for i in range(index, index + 20)))
                    index += 20

        honest = threading.Thread(target=train)
        honest.start()
        sent: list[bytes] = []
        total = 0
        while total < NUM_MESSAGES:
            with host.context.socket(zmq.DEALER) as peer:
                peer.set(zmq.LINGER, 0)
                peer.set(zmq.SNDTIMEO, 20_000)
                peer.connect(host.endpoint)
                peer.send(wire.encode(wire.Status()))
                assert peer.poll(20_000), f"the daemon is wedged after {total} messages"
                epoch = wire.decode_reply(peer.recv()).epoch
                forms = templates(rng.choice([epoch, epoch, epoch, b"e" * 16, b""]))
                if rng.random() < 0.7:
                    forms.extend([forms[0], forms[3]])
                    peer.send(bytes((wire.VERSION,)) + msgspec.msgpack.encode(forms[0]))
                for _ in range(2000):
                    frames = mutate(rng, forms, sent)
                    if len(sent) < 500:
                        sent.append(frames[0])
                    peer.send_multipart(frames)
                    total += 1
                    while peer.poll(0):
                        peer.recv()
        done.set()
        honest.join(60)
        assert not honest.is_alive()
        with host.context.socket(zmq.DEALER) as peer:
            peer.set(zmq.LINGER, 0)
            peer.connect(host.endpoint)
            peer.send(wire.encode(wire.Status()))
            assert peer.poll(20_000)
            status = wire.decode_reply(peer.recv())
    assert total >= NUM_MESSAGES
    assert delivered == list(range(len(delivered)))
    assert len(delivered) > 100
    assert status.state == "serving"
    assert status.counters["refused_messages"] > NUM_MESSAGES // 4
    assert status.counters["worker_restarts"] == 0


def test_an_oversized_message_ends_only_its_own_connection(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    endpoint = f"ipc://{tmp_path}/d.sock"
    settings = DaemonConfig(
        target=TargetConfig(model="synthetic:hidden=16,layers=6,vocab=128"),
        ring=RingConfig(slots=4, max_sessions=2, slot_tokens=64),
        transports=("inproc",),
    )
    with zmq.Context() as context:
        supervisor = Supervisor(
            settings, lambda worker: ThreadHandle(worker, context), "inproc://oversized", ServerContext(), context
        )
        control = Control(settings, (endpoint,), supervisor, context)
        loop = threading.Thread(target=control.run)
        loop.start()
        try:
            with context.socket(zmq.DEALER) as hostile, context.socket(zmq.DEALER) as honest:
                for peer in (hostile, honest):
                    peer.set(zmq.LINGER, 0)
                    peer.set(zmq.RECONNECT_IVL, -1)
                    peer.connect(endpoint)
                monitor = hostile.get_monitor_socket(zmq.EVENT_DISCONNECTED)
                hostile.send(bytes((wire.VERSION,)) + bytes(limits.MAX_MESSAGE_BYTES))
                assert monitor.poll(20_000), "a frame over the limit must end the connection"
                hostile.disable_monitor()
                monitor.close()
                honest.send(wire.encode(wire.Status()))
                assert honest.poll(20_000)
                assert wire.decode_reply(honest.recv()).counters["refused_messages"] == 0
        finally:
            control.ending.stop()
            loop.join()
            control.close()


def test_artifact_reads_beyond_the_limit_are_refused_and_probes_are_no_batches() -> None:
    settings = DaemonConfig(
        target=TargetConfig(model="synthetic:hidden=16,layers=6,vocab=128"),
        ring=RingConfig(slots=4, max_sessions=2, slot_tokens=64),
    )
    with embedded(settings) as host, host.context.socket(zmq.DEALER) as greedy:
        greedy.set(zmq.LINGER, 0)
        greedy.set(zmq.RCVTIMEO, 20_000)
        greedy.connect(host.endpoint)
        hello = wire.Hello(name="greedy", host="elsewhere", pid=0, transports=("inproc",), spec=SPEC, credits=2)
        greedy.send(wire.encode(hello))
        welcome = wire.decode_reply(greedy.recv())
        name, length = min((name, ref.nbytes) for name, ref in welcome.contract.artifacts.items())
        fetch = wire.encode(wire.Fetch(epoch=welcome.epoch, name=name, offset=0, length=length))

        def ask(times: int) -> list[type]:
            for _ in range(times):
                greedy.send(fetch)
            return [type(wire.decode_reply(greedy.recv())) for _ in range(times)]

        answers = next(answers for _ in range(100) if wire.Error in (answers := ask(3 * limits.MAX_FETCHES)))
        assert answers.count(wire.Artifact) >= limits.MAX_FETCHES
        assert ask(limits.MAX_FETCHES) == [wire.Artifact] * limits.MAX_FETCHES
        greedy.send(wire.encode(wire.Probe(epoch=welcome.epoch, seq=0, nonce=b"n" * 16, nbytes=1000)))
        assert isinstance(wire.decode_reply(greedy.recv()), wire.Ready)
        greedy.send(wire.encode(wire.Status()))
        status = wire.decode_reply(greedy.recv())
        assert (status.counters["batches"], status.counters["bytes"], status.sessions[0].batches) == (0, 0, 0)
