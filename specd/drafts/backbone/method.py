"""What every block draft is as a method: the registry's side of a form."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from specd.config.settings import CaptureConfig, Config
from specd.drafts.backbone.drafter import BlockDrafter
from specd.drafts.backbone.export import load_network
from specd.drafts.backbone.form import Form
from specd.drafts.backbone.network import Backbone
from specd.drafts.backbone.objective import BlockObjective
from specd.drafts.backbone.shape import conflict, layer_types
from specd.drafts.backbone.start import first_network, initial_shape, taps_of
from specd.drafts.backbone.weighting import check_loss
from specd.drafts.backbone.workload import workload
from specd.drafts.base import TargetParts, Tuning, Workload
from specd.errors import ConfigError
from specd.protocol.batch import Batch
from specd.protocol.capture import CaptureSpec, plain
from specd.protocol.contract import TargetContract


class BlockMethod:
    """See `specd.drafts.base.Method`. An anchor is a label with another one right behind it.

    trains: the draft of this form and its loss.
    """

    trains: ClassVar[type[BlockObjective]]
    form: ClassVar[Form]
    title: ClassVar[str]
    settings: ClassVar[type[Config]]
    free: ClassVar[frozenset[str]] = frozenset({"attention", "loss_chunk"})
    consecutive_labels: ClassVar[int] = 2
    architectures: ClassVar[tuple[str, ...]]

    @classmethod
    def check(cls, settings: Any, target: str) -> None:
        """Raise ConfigError where settings contradict each other, or the draft they begin with; 0 is the target's."""
        initial_shape(settings, cls.form)
        check_loss(settings)
        layer_types(settings)
        if cls.form.shape.names_causal and settings.sliding_window and settings.sliding_causal:
            raise ConfigError(
                f"draft.sliding_causal=true: expected false, as {cls.form.title} drafts are published and served; "
                f"leave it out"
            )
        kv = settings.num_kv_heads if settings.num_heads else 0
        window = settings.sliding_window or None
        if reason := conflict(settings.num_heads, kv or 1, settings.head_dim or 2, settings.block_size, window):
            raise ConfigError(f"draft: {reason}")

    @classmethod
    def capture_config(cls, settings: Any) -> CaptureConfig:
        """Taps, and the final states where these teach it."""
        return CaptureConfig(num_taps=settings.num_taps, final=cls.form.final)

    @classmethod
    def capture(cls, settings: Any, contract: TargetContract) -> CaptureSpec:
        """Evenly spaced taps, in the target's dtype. Raises ConfigError for a mask token that the target lacks, too."""
        if settings.mask_token_id >= contract.vocab_size:
            raise ConfigError(
                f"draft.mask_token_id={settings.mask_token_id}: expected a token of {contract.model}, whose "
                f"vocabulary has {contract.vocab_size}; give one that it never writes"
            )
        return CaptureSpec(
            taps=taps_of(settings, contract, cls.form), final=cls.form.final, dtype=plain(contract.dtype)
        )

    @classmethod
    def objective(
        cls,
        settings: Any,
        target: TargetParts,
        device: str | torch.device,
        dtype: torch.dtype,
        seed: int = 0,
        tuning: Tuning | None = None,
    ) -> BlockObjective:
        """See Method.objective."""
        return cls.trains(settings, target, device, dtype, seed, tuning)

    @classmethod
    def load(cls, path: Path) -> TrainedBlocks:
        """Read a draft's directory."""
        return TrainedBlocks(cls.form, load_network(cls.form, path))

    @staticmethod
    def workload(objective: Any, batch: Batch) -> Workload:
        """What a training step of `batch` costs."""
        return workload(objective, batch)


class TrainedBlocks:
    """A block draft that was read from its directory."""

    def __init__(self, form: Form, network: Backbone) -> None:
        self.form, self.network = form, network

    def drafter(
        self, embedding: Tensor, lm_head: Tensor, num_layers: int = 0, embedding_scale: float = 0.0
    ) -> BlockDrafter:
        """See Draft.drafter."""
        return self.form.drafter(self.network, embedding, lm_head, embedding_scale)

    def untrained(self, began: int | Path) -> TrainedBlocks:
        """See Draft.untrained."""
        shape = self.network.shape
        first = first_network(began, self.form, shape) if isinstance(began, Path) else self.form.network(shape, began)
        return TrainedBlocks(self.form, first)

    def unary(self) -> TrainedBlocks | None:
        """See Reduced.unary."""
        alone = self.form._replace(drafter=BlockDrafter)
        return None if self.form.drafter is BlockDrafter else TrainedBlocks(alone, self.network)
