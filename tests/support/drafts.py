"""A tiny DFlash draft, its target and batches for it, for several tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from specd.drafts.backbone import export
from specd.drafts.backbone.form import DFLASH
from specd.drafts.backbone.network import Backbone
from specd.drafts.backbone.shape import BlockShape
from specd.drafts.base import TargetParts, Tuning
from specd.drafts.dflash.objective import DFlash
from specd.drafts.dflash.settings import DFlashConfig
from specd.protocol.batch import Batch, Delivery
from specd.protocol.contract import TargetContract

VOCAB, HIDDEN, MASK = 97, 32, 3
TARGET: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
    "tie_word_embeddings": True,
}
CONTRACT = TargetContract(
    model="tiny", model_type="llama", hidden_size=HIDDEN, num_layers=8, vocab_size=VOCAB, dtype="float32", weights="0"
)
CONFIG = DFlashConfig(num_layers=2, num_taps=3, block_size=4, num_anchors=5, loss_chunk=7, mask_token_id=MASK)
LENGTHS = (11, 1, 17, 6)


def make_batch(lengths: tuple[int, ...] = LENGTHS, density: float = 0.8, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(
        tokens=rng.integers(0, VOCAB, sum(lengths), dtype=np.int32),
        lengths=np.array(lengths, np.int32),
        loss_mask=rng.random(sum(lengths)) < density,
        samples=tuple(range(100, 100 + len(lengths))),
    )


def parts(head: torch.Tensor | None = None, figures: Mapping[str, Any] | None = None, **changes: Any) -> TargetParts:
    """The target of the tests, its embedding and head one tensor. figures: changes of its contract."""
    if head is None:
        head = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))
    return TargetParts(msgspec.structs.replace(CONTRACT, **figures or {}), {**TARGET, **changes}, head, head)


def make_draft(config: DFlashConfig = CONFIG, seed: int = 0, tuning: Tuning | None = None, **changes: Any) -> DFlash:
    return DFlash(config, parts(**changes), seed=seed, tuning=tuning)


def deliver(batch: Batch, num_taps: int = 3, seed: int = 2) -> Delivery:
    taps = torch.randn(batch.num_tokens, num_taps, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return Delivery(batch, taps)


def taps_of(delivery: Delivery) -> torch.Tensor:
    """A delivery's taps, which it has."""
    assert delivery.taps is not None
    return delivery.taps


def draft_config(shape: BlockShape, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a DFlash draft."""
    return export.draft_config(DFLASH, shape, dtype)


def save_draft(draft: Backbone, path: Path, *, dtype: torch.dtype = torch.bfloat16, **others: Any) -> None:
    """Write a DFlash draft's directory."""
    export.save_network(draft, draft_config(draft.shape, dtype), path, dtype=dtype, **others)


def load_draft(path: Path) -> Backbone:
    """Read a DFlash draft's directory."""
    return export.load_network(DFLASH, path)
