"""DFlash as the registry knows it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor

from specd.config.settings import CaptureConfig, Config
from specd.drafts.base import TargetParts, Tuning, Workload
from specd.drafts.dflash.drafter import DFlashDrafter
from specd.drafts.dflash.export import ARCHITECTURES, load_draft
from specd.drafts.dflash.model import DFlashDraft, conflict, layer_types
from specd.drafts.dflash.objective import DFlash, loss_decay
from specd.drafts.dflash.settings import DFlashConfig
from specd.drafts.dflash.start import initial_shape, taps_of
from specd.drafts.dflash.workload import workload
from specd.errors import ConfigError
from specd.protocol.batch import Batch
from specd.protocol.capture import DTYPE_BYTES, CaptureSpec, StateDtype
from specd.protocol.contract import TargetContract


class DFlashMethod:
    """See `specd.drafts.base.Method`. An anchor is a label with another one right behind it."""

    title: ClassVar[str] = "DFlash (arXiv 2602.06036)"
    settings: ClassVar[type[Config]] = DFlashConfig
    free: ClassVar[frozenset[str]] = frozenset({"attention", "loss_chunk"})
    consecutive_labels: ClassVar[int] = 2
    architectures: ClassVar[tuple[str, ...]] = ARCHITECTURES

    @staticmethod
    def check(settings: DFlashConfig, target: str) -> None:
        """Raise ConfigError where settings contradict each other, or the draft they begin with; 0 is the target's."""
        initial_shape(settings)
        loss_decay(settings)
        layer_types(settings)
        kv = settings.num_kv_heads if settings.num_heads else 0
        window = settings.sliding_window or None
        if reason := conflict(settings.num_heads, kv or 1, settings.head_dim or 2, settings.block_size, window):
            raise ConfigError(f"draft: {reason}")

    @staticmethod
    def capture_config(settings: DFlashConfig) -> CaptureConfig:
        """Taps alone."""
        return CaptureConfig(num_taps=settings.num_taps)

    @staticmethod
    def capture(settings: DFlashConfig, contract: TargetContract) -> CaptureSpec:
        """Evenly spaced taps, in the target's dtype. Raises ConfigError for a mask token that the target lacks, too."""
        if settings.mask_token_id >= contract.vocab_size:
            raise ConfigError(
                f"draft.mask_token_id={settings.mask_token_id}: expected a token of {contract.model}, whose "
                f"vocabulary has {contract.vocab_size}; give one that it never writes"
            )
        dtype = cast(StateDtype, contract.dtype if contract.dtype in DTYPE_BYTES else "bfloat16")
        return CaptureSpec(taps=taps_of(settings, contract), dtype=dtype)

    @staticmethod
    def objective(
        settings: DFlashConfig,
        target: TargetParts,
        device: str | torch.device,
        dtype: torch.dtype,
        seed: int = 0,
        tuning: Tuning | None = None,
    ) -> DFlash:
        """The draft that is trained."""
        return DFlash(settings, target, device, dtype, seed, tuning)

    @staticmethod
    def load(path: Path) -> TrainedDFlash:
        """Read a draft's directory."""
        return TrainedDFlash(load_draft(path))

    @staticmethod
    def workload(objective: DFlash, batch: Batch) -> Workload:
        """What a training step of `batch` costs."""
        return workload(objective, batch)


class TrainedDFlash:
    """A DFlash draft that was read from its directory."""

    def __init__(self, network: DFlashDraft) -> None:
        self.network = network

    def drafter(
        self, embedding: Tensor, lm_head: Tensor, num_layers: int = 0, embedding_scale: float = 0.0
    ) -> DFlashDrafter:
        """See Draft.drafter."""
        return DFlashDrafter(self.network, embedding, lm_head, embedding_scale)

    def untrained(self, began: int | Path) -> TrainedDFlash:
        """See Draft.untrained."""
        return TrainedDFlash(load_draft(began) if isinstance(began, Path) else DFlashDraft(self.network.shape, began))
