"""Target backends: the frozen LLM whose hidden states specd serves."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING

from specd.config.settings import TargetConfig
from specd.errors import ConfigError

if TYPE_CHECKING:
    from specd.targets.base import Target

logger = logging.getLogger(__name__)


def load_target(config: TargetConfig) -> Target:
    """Load the target that `config` describes; takes seconds to minutes.

    backend `auto`: models written `synthetic:…` are synthetic; all others run in SGLang where it is installed and a GPU
    is there, else in transformers. Raises ConfigError for a target or a backend that cannot be had, TargetError for a
    target that cannot be loaded.
    """
    backend: str = config.backend
    if backend == "auto":
        backend, why = pick_backend(config)
        logger.info("%s runs in %s: %s", config.model, backend, why)
    _check_settings(config, backend)
    if backend == "synthetic":
        from specd.targets.synthetic import SyntheticTarget

        return SyntheticTarget(config)
    if backend == "transformers":
        from specd.targets.transformers.target import TransformersTarget

        return TransformersTarget(config)
    if backend == "sglang":
        from specd.targets.sglang.target import SGLangTarget

        return SGLangTarget(config)
    raise ConfigError(f"target backend {backend!r}: expected auto, sglang, transformers or synthetic")


def pick_backend(config: TargetConfig) -> tuple[str, str]:
    """The backend that `auto` stands for, and why. SGLang is looked for, not imported."""
    if config.model.partition(":")[0] == "synthetic":
        return "synthetic", "its name says so"
    if config.device.startswith("cpu"):
        return "transformers", "it is to run on the CPU"
    if importlib.util.find_spec("sglang") is None:
        return "transformers", "SGLang is not installed"
    import torch

    if not torch.cuda.is_available():
        return "transformers", "there is no GPU, which SGLang needs"
    return "sglang", "it is installed, and there is a GPU"


def _check_settings(config: TargetConfig, backend: str) -> None:
    if config.tp < 1 or not 0 <= config.memory_fraction < 1 or config.max_forward_tokens < 1:
        raise ConfigError(
            f"target.tp={config.tp}, target.memory_fraction={config.memory_fraction:g}, target.max_forward_tokens="
            f"{config.max_forward_tokens}: expected at least 1, a share from 0 (specd's choice) to 1, and at least 1"
        )
    if backend == "sglang":
        return
    for flag, given in (
        (f"target.tp={config.tp}", config.tp != 1),
        (f"target.memory_fraction={config.memory_fraction:g}", config.memory_fraction != 0),
        (f"target.attention_backend={config.attention_backend}", config.attention_backend != "auto"),
    ):
        if given:
            raise ConfigError(
                f"{flag} is a setting of the SGLang backend, but {config.model} runs in {backend}; leave it out, or "
                f"give --backend sglang"
            )
