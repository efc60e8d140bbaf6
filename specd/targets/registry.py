"""The registry of target backends, and the choice that `auto` makes."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING

from specd.config.settings import TargetConfig
from specd.errors import ConfigError
from specd.plugins import Family
from specd.targets.trial import try_out

if TYPE_CHECKING:
    from specd.targets.base import Target

logger = logging.getLogger(__name__)

BUILTIN: dict[str, str] = {
    "sglang": "specd.targets.sglang.target:SGLangTarget",
    "transformers": "specd.targets.transformers.target:TransformersTarget",
    "synthetic": "specd.targets.synthetic:SyntheticTarget",
}
FAMILY = Family("target backend", BUILTIN, "specd.targets", ConfigError)
names = FAMILY.names
OWN = {"tokenizer": "", "tp": 1, "memory_fraction": 0.0, "attention_backend": "auto", "trust_remote_code": False,
       "prefill_graphs": False}  # fmt: skip
"""Backend-specific settings and their neutral values; a backend lists those it accepts in `settings`."""


def load_target(config: TargetConfig) -> Target:
    """Load the target that `config` describes; takes seconds to minutes.

    backend `auto`: models written `synthetic:…` are synthetic; all others run in SGLang where it is installed and a GPU
    is there, else in transformers. Raises ConfigError for an unknown target or backend, TargetError for a target that
    cannot be loaded, or whose states cannot be right.
    """
    backend = config.backend
    if backend == "auto":
        backend, why = pick_backend(config)
        logger.info("%s runs in %s: %s", config.model, backend, why)
    found = FAMILY.load(backend)
    _check_settings(config, backend, getattr(found, "settings", frozenset()))
    target: Target = found(config)
    try:
        try_out(target)
    except BaseException:
        target.close()
        raise
    return target


def pick_backend(config: TargetConfig) -> tuple[str, str]:
    """The backend that `auto` picks, and why. SGLang is looked for, not imported."""
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


def _check_settings(config: TargetConfig, backend: str, own: frozenset[str]) -> None:
    """Raise ConfigError for numbers out of range, and for settings that the backend would ignore."""
    if config.tp < 1 or not 0 <= config.memory_fraction < 1 or config.max_forward_tokens < 1:
        raise ConfigError(
            f"target.tp={config.tp}, target.memory_fraction={config.memory_fraction:g}, target.max_forward_tokens="
            f"{config.max_forward_tokens}: expected at least 1, a share from 0 (specd's choice) to 1, and at least 1"
        )
    for key, none in OWN.items():
        value = getattr(config, key)
        if value != none and key not in own:
            raise ConfigError(
                f"target.{key}={value} is no setting of the backend {backend}, in which {config.model} runs; leave it "
                f"out, or give --backend sglang"
            )
