"""From a target's final states to its logits: what some families do after lm_head.

A draft that learns the target's distribution needs it; one that learns the target's own tokens does not, as the order
of logits stays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from specd.errors import ConfigError

_SCALES = {
    "logits_scaling": {"granite": -1, "hyperclovax": 1},
    "logit_scale": {"cohere": 1},
    "lm_head_multiplier": {"falcon_h1": 1},
    "output_multiplier": {"muse": 1},
}
"""Keys of a config.json that scale logits: which families have them, and the power of the value there."""
_OTHERS = ("dim_model_base", "mup_width_multiplier")
"""Keys of families whose logits are scaled outside of transformers."""
_BIASED = ("phi", "gptj", "codegen", "ctrl")
"""Families whose lm_head has a bias, which trainers do not get."""
_BIASES = {"lm_head_bias": "", "use_bias": "ernie4_5"}
"""Keys that give an lm_head one, and the families where they do."""
_CAPS = ("final_logit_softcapping", "logits_soft_cap")


class LogitTransform(NamedTuple):
    """What the target does to the products with lm_head. softcap: 0 for none."""

    scale: float = 1.0
    softcap: float = 0.0

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [rows, V] float32 -> the target's logits."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits


def logit_transform(target_config: dict[str, Any], model: str) -> LogitTransform:
    """That of the target with this config.json. Raises ConfigError for one that cannot be computed here."""
    text = target_config.get("text_config") or target_config
    kind = str(text.get("model_type", ""))
    if kind in _BIASED or any(text.get(key) and kind.startswith(family) for key, family in _BIASES.items()):
        raise ConfigError(
            f"{model} is a {kind!r}, whose lm_head has a bias that trainers do not get: a draft cannot learn its "
            f"distribution; train one that needs none, as dflash"
        )
    scale = 1.0
    for key in (*_SCALES, *_OTHERS):
        value = text.get(key)
        if value in (None, 1, 1.0):
            continue
        family = next((name for name in _SCALES.get(key, {}) if kind.startswith(name)), None)
        if family is None:
            raise ConfigError(
                f"{model} is a {kind!r} with {key}={value!r} in its config.json, and specd does not know how that "
                f"changes its logits: a draft cannot learn its distribution; train one that needs none, as dflash"
            )
        scale *= float(value) ** _SCALES[key][family]
    cap = next((float(text[key]) for key in _CAPS if text.get(key)), 0.0)
    return LogitTransform(scale, cap)
