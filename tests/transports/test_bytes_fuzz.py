"""Hostile peers at the bulk socket, with and without a session, while an honest one takes its slots byte by byte."""

from __future__ import annotations

import random
import threading
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import zmq

from faults import ASKED
from specd.memory.arena import HostArena
from specd.transports.base import ServerContext, SlotRef
from specd.transports.bytes.frames import HEADER_BYTES, MAGIC, VERSION, Header, Kind
from specd.transports.bytes.server import Bytes, BytesServer
from specd.transports.bytes.socket import BytesOffer, new_token
from specd.transports.checks import pattern, unwrap

SEED = 20261129
NUM_MESSAGES = 200_000 if ASKED else 20_000
SLOT_BYTES = 96 << 10
ODD = (0, 1, 2, 3, 55, 56, 4 << 20, 2**31, 2**32 - 1)
WIDE = (*ODD, 2**48, 2**63, 2**64 - 1)


def frames(rng: random.Random) -> list[bytes]:
    """One hostile message."""
    kind = rng.random()
    header = Header(
        rng.choice(list(Kind)), *(rng.choice(ODD) for _ in range(2)), *(rng.choice(WIDE) for _ in range(5))
    ).pack()
    if kind < 0.1:
        return [rng.randbytes(rng.randrange(0, 300))]  # up to more than is taken: then the connection ends
    if kind < 0.2:
        return [MAGIC + bytes((VERSION, rng.randrange(256))) + header[6:]]
    if kind < 0.3:
        damaged = bytearray(header)
        damaged[rng.randrange(HEADER_BYTES)] ^= 1 << rng.randrange(8)
        return [bytes(damaged)]
    if kind < 0.35:
        return [header[: rng.randrange(HEADER_BYTES)]]
    if kind < 0.4:
        return [header, rng.randbytes(20), b""]
    return [header]


def hostile(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, token: bytes
) -> Generator[zmq.Socket[bytes], None, None]:
    """Connections under one routing id, each for a while."""
    while True:
        with context.socket(zmq.DEALER) as peer:
            peer.set(zmq.LINGER, 0)
            peer.set(zmq.ROUTING_ID, token)
            peer.set(zmq.SNDTIMEO, 20_000)
            peer.set(zmq.RECONNECT_IVL, 1)
            peer.connect(endpoint)
            peer.send(Header(Kind.HELLO).pack())
            for _ in range(500):
                yield peer


def test_hostile_peers_change_no_byte_of_anothers_slot_and_end_nothing(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    done = threading.Event()
    fetched: list[bool] = []
    with ExitStack() as stack:
        arena = HostArena.create(3, SLOT_BYTES, None)
        stack.callback(arena.close)
        server: BytesServer = Bytes.server(arena, ServerContext(directory=str(tmp_path)))
        stack.callback(server.close)
        context: zmq.Context[zmq.Socket[bytes]] = stack.enter_context(zmq.Context())
        honest = Bytes.client("cpu")
        stack.callback(honest.close)
        honest.attach(server.accept(b"honest", honest.hello()), 20)
        evil = unwrap(server.accept(b"evil", Bytes.client("cpu").hello()), BytesOffer, "offer")

        def train() -> None:
            into = torch.empty(SLOT_BYTES, dtype=torch.uint8)
            generation = 0
            while not done.is_set():
                generation += 1
                slot, nonce = generation % 2, generation.to_bytes(8, "big")
                arena.begin(slot)
                arena.write(slot, pattern(nonce, SLOT_BYTES))
                arena.seal(slot, generation, SLOT_BYTES)
                ref = SlotRef(slot, generation, SLOT_BYTES)
                server.publish(b"honest", ref)
                honest.fetch(ref, into, 20)
                fetched.append(bool(np.array_equal(into.numpy(), pattern(nonce, SLOT_BYTES))))

        trainer = threading.Thread(target=train)
        trainer.start()
        arena.seal(2, 1, SLOT_BYTES)
        peers: list[Generator[zmq.Socket[bytes], None, None]] = [
            hostile(context, evil.endpoints[0], token) for token in (evil.token, new_token(), b"honest")
        ]
        for number in range(NUM_MESSAGES):
            peer = next(rng.choice(peers))
            peer.send_multipart(frames(rng))
            if number % 50 == 0:
                server.publish(b"evil", SlotRef(2, rng.choice((1, 1, 2)), rng.choice((SLOT_BYTES, 64))))
            while peer.poll(0):
                peer.recv()
        done.set()
        trainer.join(60)
        assert not trainer.is_alive()
        assert server.ignored > NUM_MESSAGES // 4
        for each in peers:
            each.close()
    assert all(fetched)
    assert len(fetched) > 50
