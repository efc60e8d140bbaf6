"""Twenty training steps to compare bit by bit, and daemons of a tiny random Qwen3 to take their states from."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import zmq
from msgspec.structs import replace

from specd.client.subscriber import Subscriber
from specd.config.settings import Config, DaemonConfig, RingConfig, SubscriberConfig, TargetConfig, TrainConfig
from specd.data.batching import Place
from specd.drafts.base import Method, TargetParts
from specd.drafts.dflash.method import DFlashMethod
from specd.drafts.dflash.settings import DFlashConfig
from specd.drafts.dflash2.method import DFlash2Method
from specd.drafts.dflash2.settings import DFlash2Config
from specd.drafts.dspark.method import DSparkMethod
from specd.drafts.dspark.settings import DSparkConfig
from specd.drafts.eagle3.method import Eagle3Method
from specd.drafts.eagle3.settings import Eagle3Config
from specd.protocol.batch import Batch
from specd.protocol.capture import CaptureSpec, StateDtype
from specd.protocol.contract import TargetContract
from specd.train.checkpoint import Checkpoints, Identity
from specd.train.journal import read
from specd.train.loop import train
from specd.train.validation import Validation

STEPS = 20
RING = RingConfig(slots=8, slot_tokens=256)
DRAFTS: dict[str, tuple[type[Method], Config]] = {
    "dflash": (
        DFlashMethod,
        DFlashConfig(
            num_layers=2,
            num_taps=3,
            block_size=4,
            num_anchors=6,
            loss="decay",  # which falls as it learns
            attention="sdpa",
            mask_token_id=255,
        ),
    ),
    "dflash2": (
        DFlash2Method,
        DFlash2Config(
            num_layers=2,
            num_taps=3,
            block_size=4,
            num_anchors=6,
            attention="sdpa",
            mask_token_id=255,
            selector_rank=8,
            loss="decay",
            selector_weight=0.2,  # its part comes only as labels are covered
        ),
    ),
    "dspark": (
        DSparkMethod,
        DSparkConfig(
            num_layers=2,
            num_taps=3,
            block_size=4,
            num_anchors=6,
            attention="sdpa",
            mask_token_id=255,
            markov_rank=8,
        ),
    ),
    "eagle3": (Eagle3Method, Eagle3Config(num_steps=4, draft_vocab_size=40)),
}
TARGET = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "hidden_act": "silu", "attention_bias": False, "dtype": "float32",
}  # fmt: skip

Context = zmq.Context[zmq.Socket[bytes]]


class Feed:
    """Twenty batches that count, from a random start and in random lengths: something a draft can learn."""

    num_batches = STEPS

    def before(self, epoch: int, index: int) -> int:
        return index

    def places(self, epoch: int, index: int) -> Iterator[Place]:
        for number in range(index, STEPS):
            tokens = int(np.random.default_rng(number).integers(10, 60, 3).sum())
            yield Place(0, number, tuple(range(3 * number, 3 * number + 3)), tokens)

    def packed(self, places: Iterable[Place]) -> Iterator[Batch]:
        yield from map(self._pack, places)

    def _pack(self, place: Place) -> Batch:
        rng = np.random.default_rng(place.index)
        lengths = rng.integers(10, 60, 3).astype(np.int32)
        total = int(lengths.sum())
        return Batch(
            tokens=(rng.integers(0, 20) + np.arange(total, dtype=np.int32)) % 20,
            lengths=lengths,
            loss_mask=rng.random(total) < 0.8,
            samples=place.samples,
            index=place.index,
        )


def write_model(path: Path) -> Path:
    """The target's directory: a config.json, for dummy weights."""
    (path / "config.json").write_text(json.dumps(TARGET))
    return path


def daemon_config(model: Path, device: str = "cpu") -> DaemonConfig:
    """The daemon that `serve` starts, for one inside this process."""
    target = TargetConfig(model=str(model), load_format="dummy", exact=True, threads=1, device=device)
    return DaemonConfig(target=target, ring=RING)


@contextlib.contextmanager
def serve(model: Path, directory: Path, device: str = "cpu", transports: str = "") -> Iterator[str]:
    """A daemon in a process of its own, its socket in `directory`; yields its endpoint once it is ready."""
    directory.chmod(0o700)
    endpoint = f"ipc://{directory}/d.sock"
    command = [sys.executable, "-m", "specd", "start", "--model", str(model), "--load-format", "dummy", "--exact"]
    command += ["--endpoint", endpoint, "--slots", str(RING.slots), "--slot-tokens", str(RING.slot_tokens)]
    command += ["--device", device, "--set", "target.threads=1", *(["--transports", transports] if transports else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert b"ready" in process.stdout.readline()
            yield endpoint
        finally:
            process.terminate()


def losses(
    path: Path,
    transport: str,
    depth: int,
    endpoints: tuple[str, ...],
    context: Context | None,
    device: str = "cpu",
    *,
    borrow: bool = False,
    draft: str = "dflash",
    every: int = 0,
    travels: StateDtype | None = None,
) -> list[float | None]:
    """The losses of twenty steps of a new draft, its files in `path`; the states must have come over `transport`.

    every: steps between measurements of three held-out batches, 0 for none. travels: as what states come, None as the
    draft reads them.
    """
    torch.set_num_threads(1)
    config = SubscriberConfig(endpoints=endpoints, transport=transport, depth=depth, timeout_s=60, borrow=borrow)
    method, own = DRAFTS[draft]

    def spec(contract: TargetContract) -> CaptureSpec:
        wanted = method.capture(own, contract)
        return replace(wanted, dtype=travels) if travels else wanted

    with Subscriber(config, spec, device=device, context=context) as source:
        published = json.loads(source.artifact("config.json"))
        counts = np.where(np.arange(source.contract.vocab_size) < 20, 100, 1)
        tensors = source.tensor("embedding"), source.tensor("lm_head")
        objective = method.objective(
            own, TargetParts(source.contract, published, *tensors, counts), device, torch.float32
        )
        settings = TrainConfig(epochs=1, lr=3e-3, save_every=0)
        checkpoints = Checkpoints(path / "checkpoints", Identity(target=source.contract.fingerprint, settings={}))
        held = (
            [Place(0, number, tuple(range(3 * number, 3 * number + 3)), 0) for number in range(50, 53)] if every else []
        )
        validation = Validation(held, every, 0, path / "validation.jsonl")
        train(settings, objective, Feed(), source, checkpoints, path / "metrics.jsonl", validation=validation)
        assert set(source.stats().transports.values()) == {transport}
    return [record.loss for record in read(path / "metrics.jsonl")]


def learns(found: list[float | None]) -> bool:
    """Whether these are twenty losses that go down: a comparison of anything else would prove little."""
    return len(found) == STEPS and found[0] is not None and found[-1] is not None and found[-1] < found[0]
