"""Target backends: the frozen LLM whose hidden states specd serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specd.config import TargetConfig
from specd.errors import ConfigError

if TYPE_CHECKING:
    from specd.targets.base import Target


def load_target(config: TargetConfig) -> Target:
    """Load the target that `config` describes; takes seconds to minutes.

    backend `auto`: models written `synthetic:…` are synthetic, all others run in transformers. Raises ConfigError for a
    target that does not exist, TargetError for one that cannot be loaded.
    """
    backend = config.backend
    if backend == "auto":
        backend = "synthetic" if config.model.partition(":")[0] == "synthetic" else "transformers"
    if backend == "synthetic":
        from specd.targets.synthetic import SyntheticTarget

        return SyntheticTarget(config)
    if backend == "transformers":
        from specd.targets.transformers import TransformersTarget

        return TransformersTarget(config)
    raise ConfigError(f"target backend {backend!r}: expected auto, transformers or synthetic")
