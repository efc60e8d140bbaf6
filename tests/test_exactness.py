"""Twenty training steps give bit-identical losses whatever carries the states: transport, depth, number of daemons."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zmq

from specd.client import Subscriber
from specd.config import DaemonConfig, DFlashConfig, RingConfig, SubscriberConfig, TargetConfig, TrainConfig
from specd.host import embedded
from specd.packing import Batch
from specd.train.checkpoint import Checkpoints, Identity
from specd.train.dflash import DFlash, capture_spec
from specd.train.journal import read
from specd.train.loop import train

STEPS = 20
RING = RingConfig(slots=8, slot_tokens=256)
DRAFT = DFlashConfig(num_layers=2, num_taps=3, block_size=4, num_anchors=6, attention="sdpa")
TARGET = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "hidden_act": "silu", "attention_bias": False, "dtype": "float32",
}  # fmt: skip


class Feed:
    """Twenty batches that count, from a random start and in random lengths: something a draft can learn."""

    num_batches = STEPS

    def batches(self, epoch: int, index: int) -> Iterator[Batch]:
        for number in range(index, STEPS):
            rng = np.random.default_rng(number)
            lengths = rng.integers(10, 60, 3).astype(np.int32)
            total = int(lengths.sum())
            yield Batch(
                tokens=(rng.integers(0, 20) + np.arange(total, dtype=np.int32)) % 20,
                lengths=lengths,
                loss_mask=rng.random(total) < 0.8,
                samples=tuple(range(3 * number, 3 * number + 3)),
                index=number,
            )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(TARGET))
    return path


@pytest.fixture(scope="module")
def processes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """Endpoints of two daemons in processes of their own."""
    with contextlib.ExitStack() as stack:
        endpoints, started = [], []
        for name in ("a", "b"):
            directory = tmp_path_factory.mktemp(name)
            directory.chmod(0o700)
            endpoints.append(f"ipc://{directory}/d.sock")
            command = [sys.executable, "-m", "specd", "start", "--model", str(model), "--load-format", "dummy"]
            command += ["--exact", "--endpoint", endpoints[-1], "--slots", "8", "--slot-tokens", "256"]
            command += ["--set", "target.threads=1"]
            started.append(stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE)))
        for process in started:
            stack.callback(process.terminate)
            assert process.stdout is not None
            assert b"ready" in process.stdout.readline()
        yield tuple(endpoints)


@pytest.fixture(scope="module")
def threads(model: Path) -> Iterator[tuple[zmq.Context[zmq.Socket[bytes]], tuple[str, ...]]]:
    """Two daemons on threads of this process."""
    target = TargetConfig(model=str(model), load_format="dummy", exact=True, threads=1)
    settings = DaemonConfig(target=target, ring=RING)
    with zmq.Context() as context, embedded(settings, context) as one, embedded(settings, context) as two:
        yield context, (one.endpoint, two.endpoint)


def losses(
    path: Path, transport: str, depth: int, endpoints: tuple[str, ...], context: zmq.Context[zmq.Socket[bytes]] | None
) -> list[float | None]:
    torch.set_num_threads(1)
    config = SubscriberConfig(endpoints=endpoints, transport=transport, depth=depth, timeout_s=60)
    with Subscriber(config, lambda contract: capture_spec(DRAFT, contract), context=context) as source:
        objective = DFlash(
            DRAFT,
            source.contract,
            json.loads(source.artifact("config.json")),
            source.tensor("embedding"),
            source.tensor("lm_head"),
            mask_token_id=255,
        )
        settings = TrainConfig(epochs=1, lr=3e-3, save_every=0)
        checkpoints = Checkpoints(path / "checkpoints", Identity(target=source.contract.fingerprint, settings={}))
        train(settings, objective, Feed(), source, checkpoints, path / "metrics.jsonl")
        assert set(source.stats().transports.values()) == {transport}
    return [record.loss for record in read(path / "metrics.jsonl")]


@pytest.fixture(scope="module")
def reference(
    threads: tuple[zmq.Context[zmq.Socket[bytes]], tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory
) -> list[float | None]:
    context, endpoints = threads
    found = losses(tmp_path_factory.mktemp("reference"), "inproc", 0, endpoints[:1], context)
    assert len(found) == STEPS
    assert found[-1] is not None
    assert found[0] is not None
    assert found[-1] < found[0]
    return found


@pytest.mark.parametrize("num_daemons", [1, 2])
@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("transport", ["inproc", "shm", "bytes"])
def test_losses_are_bit_identical(
    transport: str,
    depth: int,
    num_daemons: int,
    processes: tuple[str, ...],
    threads: tuple[zmq.Context[zmq.Socket[bytes]], tuple[str, ...]],
    reference: list[float | None],
    tmp_path: Path,
) -> None:
    context, local = threads
    if transport == "inproc":
        found = losses(tmp_path, transport, depth, local[:num_daemons], context)
    else:
        found = losses(tmp_path, transport, depth, processes[:num_daemons], None)
    assert found == reference
