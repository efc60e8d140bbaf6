"""Draft configs in the form of the library Speculators, as the keys that others publish."""

from __future__ import annotations

from typing import Any

from specd.errors import ConfigError

_OWN = frozenset({"speculators_model_type", "transformer_layer_config"})


def unwrapped(config: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    """`config` with the keys of its `transformer_layer_config` at the top; one without it is returned as it is.

    kind: which draft it should be, as Speculators calls it. Layer ids there count the embedding as the first, so they
    are one more than everywhere else. Raises ConfigError for another kind.
    """
    if "transformer_layer_config" not in config:
        return config
    layers = config["transformer_layer_config"]
    if config.get("speculators_model_type") != kind or not isinstance(layers, dict):
        raise ConfigError(
            f"draft {where!r}: speculators_model_type is {config.get('speculators_model_type')!r}, expected {kind!r} "
            f"beside an object transformer_layer_config; specd cannot run this draft"
        )
    found = dict(layers) | {key: value for key, value in config.items() if key not in _OWN}
    found["architectures"] = config.get("architectures")
    if kind != "eagle3":
        if (ids := found.pop("aux_hidden_state_layer_ids", None)) is not None:
            found["target_layer_ids"] = [layer - 1 for layer in ids]
        if found.pop("sliding_window_non_causal", kind == "dflash2"):
            found["is_causal"] = False
    return found
