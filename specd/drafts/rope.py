"""Rotary settings of a config.json: the base frequency, and the scaling for long texts where there is one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specd.errors import ConfigError

Scaling = dict[str, str | int | float | bool]
"""What transformers calls `rope_parameters`, without `rope_theta`."""

_NEEDS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor"},
}
_MAY = {
    "yarn": {
        "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "truncate",
    }
}  # fmt: skip
_HARMLESS = {"rope_type", "type", "rope_theta", "mrope_section", "mrope_interleaved"}
"""Sections of multimodal positions among them: those of a text's tokens are equal in all sections."""
_FLAGS = frozenset({"truncate"})
_FULL = "full_attention"


def rope_theta(config: Mapping[str, Any]) -> float:
    """The base frequency of a model's rotary embedding. Raises ConfigError where it has several and none is `_FULL`'s.

    Newer configs keep it inside `rope_parameters`, some one for each type of layer: a draft takes that of layers that
    see everything. Raises ConfigError, too, for one that is no positive number.
    """
    found = _settings(config).get("rope_theta") or config.get("rope_theta") or 10000.0
    if not _is_positive(found):
        raise ConfigError(f"config.json: rope_theta is {found!r}, expected a positive number")
    return float(found)


def rope_scaling(config: Mapping[str, Any], where: str) -> Scaling | None:
    """The scaling that a draft's config.json asks for, None for none. Raises ConfigError for one that is not known."""
    found = _settings(config)
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind == "mrope":
        kind = "default"
    found = {key: value for key, value in found.items() if value is not None and key not in _HARMLESS}
    if found.get("partial_rotary_factor") == 1:
        del found["partial_rotary_factor"]
    if kind == "default":
        needs: set[str] = set()
        allowed = needs
    elif kind in _NEEDS:
        needs = _NEEDS[kind]
        allowed = needs | _MAY.get(kind, set())
    else:
        raise ConfigError(
            f"draft {where!r}: rope_type is {kind!r}, expected default, {', '.join(sorted(_NEEDS))}; specd cannot run "
            f"this draft"
        )
    strange, missing = found.keys() - allowed, needs - found.keys()
    if strange or missing:
        raise ConfigError(
            f"draft {where!r}: rope_parameters of type {kind!r} with {', '.join(sorted(found)) or 'no keys'}: expected "
            f"{', '.join(sorted(allowed)) or 'none'}; specd cannot run this draft"
        )
    for key, value in found.items():
        neutral = key.startswith("mscale") and value == 0
        if not (isinstance(value, bool) if key in _FLAGS else neutral or _is_positive(value)):
            expected = "true or false" if key in _FLAGS else "a positive number"
            raise ConfigError(f"draft {where!r}: {key} of its rope_parameters is {value!r}, expected {expected}")
    return None if kind == "default" else {"rope_type": str(kind), **found}


def frequencies(
    theta: float, scaling: Scaling, head_dim: int, num_heads: int, max_positions: int
) -> tuple[Tensor, float]:
    """Inverse frequencies float32 [D / 2], and what cosine and sine are multiplied by: as transformers has them."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=head_dim * num_heads,
        num_attention_heads=num_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_theta": theta, **scaling},
    )
    inverse, factor = ROPE_INIT_FUNCTIONS[str(scaling["rope_type"])](config, torch.device("cpu"))
    return inverse.float(), float(factor)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of a config, or `rope_scaling` as older ones call it; of several the one of full attention."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"config.json: rope_parameters is {found!r}, expected an object")
    if not any(isinstance(value, Mapping) for value in found.values()):
        return dict(found)
    own = found.get(_FULL)
    if not isinstance(own, Mapping):
        raise ConfigError(
            f"config.json: rope_parameters has entries for {', '.join(sorted(found))}: expected one for {_FULL}, whose "
            f"frequency a draft takes"
        )
    return dict(own)
