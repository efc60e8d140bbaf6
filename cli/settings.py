"""Settings from the command line: flags, files and `--set` on top of a preset."""

from __future__ import annotations

from typing import Any

from specd.config.load import convert, merge, overrides
from specd.config.presets import preset
from specd.config.settings import DaemonConfig, DataConfig
from specd.errors import ConfigError


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given: no None, no empty text or list, no empty mapping left by them."""
    kept = {key: given(value) if isinstance(value, dict) else value for key, value in flags.items()}
    return {key: value for key, value in kept.items() if value is not None and value not in ("", [], {})}


def daemon_config(
    file: dict[str, Any], flags: dict[str, Any], settings: list[str], where: str = "specd start"
) -> DaemonConfig:
    """A DaemonConfig from, weakest first: the preset's recipe, a config file, flags, `--set`.

    Raises ConfigError that names `where` and the key at fault, or when no model is given.
    """
    asked = merge(merge(file, flags), overrides(settings))
    target = asked.get("target")
    model = target.get("model") if isinstance(target, dict) else None
    if not model:
        raise ConfigError("no target given: expected --model with a preset, a local directory or a hub name")
    recipe = preset(str(model))
    names = ("target", "capture", "ring")
    under: dict[str, Any] = {name: getattr(recipe, name) for name in names} if recipe else {}
    return convert(merge(under, asked), DaemonConfig, where)


def data_config(source: str, model: str, settings: list[str] | None, run: dict[str, Any] | None = None) -> DataConfig:
    """The data section: that of a run or else the preset's, then the flags, then --set."""
    known = preset(model)
    asked = overrides([text if text.startswith("data.") else f"data.{text}" for text in settings or []])
    base: dict[str, Any] = run if run is not None else known.run.get("data", {}) if known else {}
    config = convert(
        merge(merge(base, {"path": source} if source else {}), asked["data"] if asked else {}), DataConfig, "data"
    )
    if not config.path:
        raise ConfigError(f"model {model!r} has no preset that names data; give a file or a hub name")
    return config
