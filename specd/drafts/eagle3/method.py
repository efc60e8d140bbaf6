"""EAGLE-3 as the registry knows it."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import msgspec
import torch
from torch import Tensor

from specd.config.settings import CaptureConfig, Config
from specd.drafts.base import TargetParts, Tuning, Workload
from specd.drafts.eagle3.drafter import Eagle3Drafter
from specd.drafts.eagle3.export import ARCHITECTURES, load_draft
from specd.drafts.eagle3.model import Eagle3Draft
from specd.drafts.eagle3.objective import Eagle3
from specd.drafts.eagle3.settings import Eagle3Config
from specd.drafts.eagle3.start import initial_shape, taps_of
from specd.drafts.eagle3.workload import workload
from specd.errors import ConfigError
from specd.protocol.batch import Batch
from specd.protocol.capture import CaptureSpec, plain
from specd.protocol.contract import TargetContract


class Eagle3Method:
    """See `specd.drafts.base.Method`. The first guess reads a label and predicts the one behind it."""

    title: ClassVar[str] = "EAGLE-3 (arXiv 2503.01840)"
    settings: ClassVar[type[Config]] = Eagle3Config
    free: ClassVar[frozenset[str]] = frozenset({"attention", "loss_chunk"})
    consecutive_labels: ClassVar[int] = 2
    architectures: ClassVar[tuple[str, ...]] = ARCHITECTURES

    @staticmethod
    def check(settings: Eagle3Config, target: str) -> None:
        """Raise ConfigError for settings that contradict each other or the draft they begin with; 0 is the target's."""
        initial_shape(settings)
        if settings.num_heads and settings.num_kv_heads and settings.num_heads % settings.num_kv_heads:
            raise ConfigError(
                f"draft: num_heads {settings.num_heads} is not a multiple of num_kv_heads {settings.num_kv_heads}"
            )

    @staticmethod
    def capture_config(settings: Eagle3Config) -> CaptureConfig:
        """Three taps and the final state."""
        return CaptureConfig(num_taps=3, final=True)

    @staticmethod
    def capture(settings: Eagle3Config, contract: TargetContract) -> CaptureSpec:
        """An early, a middle and a late tap and the final state, in the target's dtype."""
        return CaptureSpec(taps=taps_of(settings, contract), final=True, dtype=plain(contract.dtype))

    @staticmethod
    def objective(
        settings: Eagle3Config,
        target: TargetParts,
        device: str | torch.device,
        dtype: torch.dtype,
        seed: int = 0,
        tuning: Tuning | None = None,
    ) -> Eagle3:
        """The draft that is trained."""
        return Eagle3(settings, target, device, dtype, seed, tuning)

    @staticmethod
    def load(path: Path) -> TrainedEagle3:
        """Read a draft's directory."""
        return TrainedEagle3(load_draft(path))

    @staticmethod
    def workload(objective: Eagle3, batch: Batch) -> Workload:
        """What a training step of `batch` costs."""
        return workload(objective, batch)


class TrainedEagle3:
    """An EAGLE-3 draft that was read from its directory, or, `untrained`, one as training begins with it."""

    def __init__(self, network: Eagle3Draft, *, untrained: bool = False) -> None:
        self.network, self._untrained = network, untrained

    def drafter(
        self, embedding: Tensor, lm_head: Tensor, num_layers: int = 0, embedding_scale: float = 0.0
    ) -> Eagle3Drafter:
        """See Draft.drafter. Engines give it bare rows, whatever the target makes of them; it norms what it reads."""
        drafter = Eagle3Drafter(self.network, embedding, num_layers)
        if self._untrained:
            self.network.start_head(lm_head)
        return drafter

    def untrained(self, began: int | Path) -> TrainedEagle3:
        """See Draft.untrained. It guesses as many tokens in a row as this one, so that both can be compared."""
        if isinstance(began, Path):
            network = load_draft(began)
            network.shape = msgspec.structs.replace(network.shape, num_steps=self.network.shape.num_steps)
            return TrainedEagle3(network)
        return TrainedEagle3(Eagle3Draft(self.network.shape, began, self.network.vocabulary), untrained=True)
