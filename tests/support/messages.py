"""One sample of every message, and a decoder of them all, for tests."""

from __future__ import annotations

import struct
from typing import Any, get_args

from specd.errors import ProtocolError
from specd.protocol import contract
from specd.protocol import messages as wire
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec

EPOCH = bytes(range(16))
BATCH = bytes(range(0xA0, 0xB0))
SPEC = CaptureSpec(taps=(1, 12), final=True, dtype="bfloat16")
CONTRACT = contract.TargetContract(
    model="smollm2-135m",
    model_type="llama",
    hidden_size=576,
    num_layers=30,
    vocab_size=49152,
    dtype="float32",
    weights="ab12",
    tokenizer="cd34",
    chat_template="",
    artifacts={
        "config.json": contract.ArtifactRef(nbytes=861),
        "embedding": contract.ArtifactRef(nbytes=113246208, shape=(49152, 576), dtype="float32"),
        "lm_head": contract.ArtifactRef(nbytes=113246208, shape=(49152, 576), dtype="float32", same_as="embedding"),
    },
)
RING = contract.RingInfo(num_slots=8, slot_bytes=12288, slot_tokens=4096, payload_bytes=64 << 20)
REPLAY = contract.ReplayInfo(cells=7936, used=36, cell_bytes=63 << 20)
SAMPLES: tuple[wire.Message, ...] = (
    wire.Hello(
        epoch=EPOCH, name="trainer", host="h1", pid=4242, gpus=("GPU-0",), transports=("shm", "bytes"), spec=SPEC,
        credits=3, fingerprint="llama:576", payloads=("pixel_values",), run=BATCH, ranks=2, share="sweep",
        epoch_batches=1 << 33,
    ),
    wire.Attach(epoch=EPOCH, transport="shm", hello=b"\x01\x02"),
    wire.Probe(epoch=EPOCH, seq=0, nonce=bytes(range(16)), nbytes=65536),
    wire.Submit(
        epoch=EPOCH, seq=1, batch_id=BATCH, tokens=struct.pack("<3i", 5, 6, 49151), lengths=struct.pack("<2i", 1, 2),
        payloads=(b"", b"\x80"), place=1 << 32, keep=False,
    ),
    wire.RecvReady(epoch=EPOCH, lease=7),
    wire.Borrow(epoch=EPOCH, lease=8),
    wire.Release(epoch=EPOCH, lease=1 << 40),
    wire.Renew(epoch=EPOCH, epoch_batches=1 << 33),
    wire.Fetch(epoch=EPOCH, name="embedding", offset=1048576, length=262144),
    wire.Status(),
    wire.Bye(epoch=EPOCH),
    wire.Welcome(
        epoch=EPOCH, contract=CONTRACT, ring=RING, credits=3, slots=5, lease_ttl_ms=30000, transports=("shm", "bytes"),
        sharing=1, replay=REPLAY,
    ),
    wire.Reject(epoch=EPOCH, reason="the daemon is starting its worker", retry_ms=300, loading_ms=600000),
    wire.Offer(epoch=EPOCH, transport="shm", offer=b"{}"),
    wire.Refuse(epoch=EPOCH, transport="shm", reason="another host"),
    wire.Ready(
        epoch=EPOCH, seq=1, batch_id=BATCH, lease=9, slot=2, generation=17, layout=slot_layout(SPEC, 4, 3),
        busy_slots=3, target_us=70125, held=SPEC, source="replay",
    ),
    wire.Failed(epoch=EPOCH, seq=1, batch_id=BATCH, reason="the daemon is draining", retry=True),
    wire.Revoke(epoch=EPOCH, reason="its lease expired"),
    wire.Renewed(epoch=EPOCH),
    wire.Artifact(epoch=EPOCH, name="config.json", offset=0, data=b"{}\n"),
    wire.StatusReport(
        epoch=EPOCH, state="serving", version="0.1.0", pid=10, worker_pid=11, uptime_s=1.5, contract=None, ring=RING,
        slots={"free": 6, "filling": 0, "ready": 1, "quarantined": 1}, queued=0,
        sessions=(
            wire.SessionStatus(
                session="00ff", name="trainer", transport="shm", gpus=("GPU-0",), credits=3, outstanding=1, leases=1,
                batches=2, nbytes=24576, age_s=0.5, tokens=512, run="7f3a91c2", ranks=2,
                share="sweep", behind=True,
            ),
        ),
        counters={"batches": 2}, endpoints=("ipc:///run/s.sock",), transports=("shm", "bytes"),
        max_sessions=4, replay=REPLAY, lag_cells=9, lag_used=2,
    ),
    wire.Error(epoch=EPOCH, reason="seq 1 is outstanding already"),
)  # fmt: skip
TYPES = (*get_args(wire.ToDaemon), *get_args(wire.ToTrainer))
BY_TAG = {str(type(message).__struct_config__.tag): message for message in SAMPLES}


def decode(frame: bytes | memoryview) -> Any:
    """The message in a frame, whichever side it is for."""
    try:
        return wire.decode_request(frame)
    except ProtocolError as error:
        if "at `$.type`" not in str(error):
            raise
    return wire.decode_reply(frame)
