"""Drafts, targets and batches without a random number, and a few figures that tell their gradients apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from drafts import CONFIG as DFLASH
from drafts import HIDDEN, VOCAB, make_draft
from dspark import CONFIG as DSPARK
from dspark import make_dspark
from eagle import parts
from specd.drafts.dflash.objective import DFlash
from specd.drafts.dflash.settings import DFlashConfig
from specd.drafts.dspark.objective import DSpark
from specd.drafts.dspark.settings import DSparkConfig
from specd.drafts.eagle3.objective import Eagle3
from specd.drafts.eagle3.settings import Eagle3Config
from specd.protocol.batch import Batch, Delivery

FILE = Path(__file__).parents[1] / "golden/drafts.json"
"""What SpecForge and Speculators say; written by tests/oracles/write_golden.py."""
LENGTHS = (19, 1, 9, 24, 2)
PROMPT = 7
EAGLE_CASES: dict[str, Eagle3Config] = {
    "specforge": Eagle3Config(num_steps=7, draft_vocab_size=60),
    "specforge, fc_norm, all tokens": Eagle3Config(num_steps=3, draft_vocab_size=0, fc_norm=True, loss_decay=1.0),
    "speculators": Eagle3Config(num_steps=7, draft_vocab_size=60),
    "speculators, norm_output, fc_norm": Eagle3Config(num_steps=5, draft_vocab_size=60, norm_output=True, fc_norm=True),
}
"""The peer that was asked comes first."""
DFLASH_CASES: dict[str, DFlashConfig] = {
    "specforge": msgspec.structs.replace(DFLASH, loss="decay"),
    "specforge, dpace": msgspec.structs.replace(DFLASH, loss="dpace", dpace_alpha=0.3),
}

DSPARK_CASES: dict[str, DSparkConfig] = {"specforge": msgspec.structs.replace(DSPARK, num_anchors=50)}


def wave(number: int, *shape: int) -> Tensor:
    """Values in [−1, 1] that look like noise, float32; of each number other ones."""
    places = torch.arange(np.prod(shape, dtype=int), dtype=torch.float64) + 13 * number
    return torch.sin(0.0137 * places * places + number).float().view(*shape)


def golden_eagle(config: Eagle3Config) -> tuple[Eagle3, Delivery]:
    """A draft whose vocabulary is spread over the target's, and a packed batch with holes under its mask."""
    objective = Eagle3(config, parts())
    _fill(objective)
    size = objective.draft.shape.draft_vocab_size
    if size < VOCAB:
        chosen = torch.sort(torch.arange(size) * 37 % VOCAB).values
        objective.draft.d2t.copy_(chosen - torch.arange(size))
    states = 2 * wave(500, sum(LENGTHS), 4, HIDDEN)
    return objective, Delivery(_batch(), states[:, :3], states[:, 3])


def golden_dflash(config: DFlashConfig) -> tuple[DFlash, Delivery]:
    """A draft that has every anchor there is, and the same batch."""
    objective = make_draft(config)
    _fill(objective)
    return objective, Delivery(_batch(), 2 * wave(500, sum(LENGTHS), 3, HIDDEN))


def golden_dspark(config: DSparkConfig) -> tuple[DSpark, Delivery]:
    """A draft that has every anchor there is, the same batch, and final states."""
    objective = make_dspark(config)
    _fill(objective)
    states = 2 * wave(500, sum(LENGTHS), 4, HIDDEN)
    return objective, Delivery(_batch(), states[:, :3], states[:, 3])


def figures(total: float, counted: list[int], gradients: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of a loss and its gradients: for each of these its norm, and its product with a wave."""
    return {
        "total": total,
        "counted": counted,
        "gradients": {name: [float(value.norm()), _product(value)] for name, value in gradients.items()},
    }


def differences(found: dict[str, Any], golden: dict[str, Any]) -> dict[str, float]:
    """Relative differences of figures, by name."""
    assert found["counted"] == golden["counted"]
    assert found["gradients"].keys() == golden["gradients"].keys()
    apart = {"total": abs(found["total"] / golden["total"] - 1)}
    for name, (norm, product) in golden["gradients"].items():
        apart[name] = max(
            abs(one - other) for one, other in zip(found["gradients"][name], (norm, product), strict=True)
        )
        apart[name] /= norm
    return apart


def read_golden() -> dict[str, Any]:
    """The figures of all cases, by case."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def _fill(objective: Eagle3 | DFlash | DSpark) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(objective.module.parameters()):
            values = wave(number, *parameter.shape)
            parameter.copy_(0.3 * values if parameter.dim() > 1 else 1 + values / 2)
    objective.embedding, objective.lm_head = wave(300, VOCAB, HIDDEN), wave(400, VOCAB, HIDDEN)


def _batch() -> Batch:
    tokens = np.arange(sum(LENGTHS), dtype=np.int64)
    within = np.concatenate([np.arange(length) for length in LENGTHS])
    return Batch(
        tokens=((tokens * tokens * 7 + 3) % VOCAB).astype(np.int32),
        lengths=np.array(LENGTHS, np.int32),
        loss_mask=(within >= PROMPT) & (within % 6 != 4),
        samples=tuple(range(len(LENGTHS))),
    )


def _product(gradient: Tensor) -> float:
    """With a wave of length 1."""
    against = wave(7, *gradient.shape)
    return float((gradient * against).sum() / against.norm())
