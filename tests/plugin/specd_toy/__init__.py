"""A draft from another package: one matrix that guesses the token after the next from a late layer of the target.

It is as small as a draft can be, and complete: it trains, resumes, is exported, read back and evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from msgspec import Meta
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from specd.config.settings import CaptureConfig, Config
from specd.drafts.base import Loss, TargetParts, Tuning, Workload
from specd.drafts.files import write_draft
from specd.errors import ConfigError
from specd.protocol.batch import Batch, Delivery
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import TargetContract

ARCHITECTURE = "ToyDraft"


class ToyConfig(Config, kw_only=True, frozen=True):
    """scale: of the matrix's first values."""

    scale: Annotated[float, Meta(ge=0)] = 0.02


class Toy:
    """The objective. module: the matrix, float32 [H, H]."""

    def __init__(self, settings: ToyConfig, target: TargetParts, device: str | torch.device, seed: int) -> None:
        self._device, self._tap, self._scale = torch.device(device), target.contract.num_layers - 2, settings.scale
        self._head = target.lm_head.to(self._device, torch.float32)
        self.module = _matrix(target.contract.hidden_size, settings.scale, seed).to(self._device)

    def loss(self, delivery: Delivery) -> Loss:
        """Cross-entropy of the token two places on, where it is a label of the same sequence."""
        batch, taps = delivery.batch, delivery.taps
        assert taps is not None, "asked for in `capture`"
        rows = torch.from_numpy(_rows(batch)).to(self._device)
        labels = torch.from_numpy(batch.tokens.astype(np.int64)).to(self._device)[rows + 2]
        logits = F.linear(self.module(taps.flatten(1).float()[rows]), self._head)
        right = (logits.argmax(-1) == labels).sum().float()[None]
        weight = torch.tensor(len(rows), dtype=torch.float32, device=self._device)
        total = F.cross_entropy(logits, labels, reduction="sum") if len(rows) else (self.module.weight * 0).sum()
        return Loss(total, weight, {"correct": right, "counted": weight[None]})

    def warm_up(self, dtype: torch.dtype) -> None:
        """Nothing is compiled."""

    def facts(self) -> dict[str, str]:
        """What the report shows."""
        return {"taps": str(self._tap), "trained parameters": f"{self.module.weight.numel():,}"}

    def export(self, path: Path, files: Mapping[str, bytes] | None = None) -> None:
        """Write config.json and the matrix."""
        config = {"architectures": [ARCHITECTURE], "tap": self._tap, "scale": self._scale}
        config |= {"hidden_size": self.module.in_features}
        write_draft(path, config, self.module.state_dict(), files or {})


class ToyDraft:
    """A trained one, which is its own drafter: it guesses one token a block."""

    block_size = 2

    def __init__(self, module: torch.nn.Linear, tap: int, scale: float) -> None:
        self._module, self.taps, self._scale = module, (tap,), scale
        self._head = self._last = torch.empty(0)

    def drafter(
        self, embedding: Tensor, lm_head: Tensor, num_layers: int = 0, embedding_scale: float = 0.0
    ) -> ToyDraft:
        """Itself, beside a target."""
        if lm_head.shape[1] != self._module.in_features:
            raise ConfigError(
                f"the draft is for hidden size {self._module.in_features}, this target's is {lm_head.shape[1]}"
            )
        self._module.to(lm_head.device)
        self._head = lm_head.float()
        return self

    def untrained(self, seed: int) -> ToyDraft:
        """One with the matrix that training began with."""
        return ToyDraft(_matrix(self._module.in_features, self._scale, seed), self.taps[0], self._scale)

    def reset(self) -> None:
        """Another text begins."""

    def extend(self, tokens: Tensor, taps: Tensor) -> None:
        """Keep the newest state."""
        self._last = taps[-1:].float()

    def propose(self, token: int) -> Tensor:
        """The token after `token`."""
        return F.linear(self._module(self._last), self._head).argmax(-1)


class ToyMethod:
    """What the entry point names."""

    title: ClassVar[str] = "a toy"
    settings: ClassVar[type[Config]] = ToyConfig
    free: ClassVar[frozenset[str]] = frozenset()
    consecutive_labels: ClassVar[int] = 1
    architectures: ClassVar[tuple[str, ...]] = (ARCHITECTURE,)

    @staticmethod
    def check(settings: ToyConfig, target: str) -> None:
        """Whatever fits the struct works."""

    @staticmethod
    def capture_config(settings: ToyConfig) -> CaptureConfig:
        """One tap, in float32 whatever the target computes in."""
        return CaptureConfig(num_taps=1, dtype="float32")

    @staticmethod
    def capture(settings: ToyConfig, contract: TargetContract) -> CaptureSpec:
        """The last layer that can be tapped."""
        return CaptureSpec(taps=(contract.num_layers - 2,), dtype="float32")

    @staticmethod
    def objective(
        settings: ToyConfig,
        target: TargetParts,
        device: str | torch.device,
        dtype: torch.dtype,
        seed: int = 0,
        tuning: Tuning | None = None,
    ) -> Toy:
        """It computes in float32 whatever it is asked."""
        return Toy(settings, target, device, seed)

    @staticmethod
    def load(path: Path) -> ToyDraft:
        """Read a directory that `Toy.export` wrote."""
        config: dict[str, Any] = json.loads((path / "config.json").read_text())
        module = _matrix(config["hidden_size"], 0.0, 0)
        module.load_state_dict(load_file(path / "model.safetensors"))
        return ToyDraft(module, config["tap"], config["scale"])

    @staticmethod
    def workload(objective: Toy, batch: Batch) -> Workload:
        """One product of each row with the matrix, one with the head."""
        rows, size = len(_rows(batch)), objective.module.in_features
        parts: dict[str, Callable[[], object]] = {}
        return Workload(rows, rows, {"matrix": 6.0 * rows * size * size}, parts)


def _matrix(size: int, scale: float, seed: int) -> torch.nn.Linear:
    module = torch.nn.Linear(size, size, bias=False, dtype=torch.float32)
    with torch.no_grad():
        module.weight.normal_(0, scale, generator=torch.Generator().manual_seed(seed))
    return module


def _rows(batch: Batch) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Rows t whose token t + 2 is a label of the same sequence."""
    ends = np.repeat(np.cumsum(batch.lengths), batch.lengths)
    rows = np.arange(batch.num_tokens)
    inside = rows + 2 < ends
    return rows[inside][batch.loss_mask[rows[inside] + 2]].astype(np.int64)
