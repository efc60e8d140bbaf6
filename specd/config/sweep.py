"""A file of several runs on one target: what all of them have, and what each has of its own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specd.config.load import convert, load_yaml, merge
from specd.config.settings import RunConfig
from specd.errors import ConfigError

SECTIONS = ("base", "runs")
NAME = re.compile(r"\w[\w.+-]{0,99}")
TAKEN = ("daemon", "daemon.log")
"""What lies beside the runs."""


def read_sweep(path: Path, over: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each run in a file, by its name: `base`, then its own, then `over`, as for `RunConfig`.

    A key may be a path, as `draft.num_taps`. Raises ConfigError that names the run and the key at fault.
    """
    where = f"sweep {str(path)!r}"
    found = load_yaml(path)
    for key in found:
        if key not in SECTIONS:
            close = difflib.get_close_matches(str(key).lower(), SECTIONS, n=1)
            hint = f"did you mean {close[0]}?" if close else "settings that all runs have go under base"
            raise ConfigError(f"{where}: unknown key {key!r}, expected {' and '.join(SECTIONS)}; {hint}")
    base, runs = found.get("base") or {}, found.get("runs")
    if not isinstance(runs, dict) or not runs:
        raise ConfigError(f"{where}: runs is {runs!r}: expected settings by name, as runs: {{a: {{method: eagle3}}}}")
    base = _nested(base, f"{where}: base")
    asked = {}
    for name, own in runs.items():
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise ConfigError(f"{where}: run {name!r}: expected a name, in quotes where YAML reads another thing")
        if not NAME.fullmatch(str(name)):
            raise ConfigError(
                f"{where}: run {name!r}: expected letters, digits, _, ., + and -, at most 100, as it names a directory"
            )
        if name in TAKEN or f"{name}".removesuffix(".log") in runs.keys() - {name}:
            raise ConfigError(f"{where}: run {name!r}: a log has that name: choose another")
        own = _nested({} if own is None else own, f"{where}: run {name}")
        if "target" in own:
            raise ConfigError(f"{where}: run {name}: target: expected it under base, as all runs have the same")
        asked[str(name)] = _checked(merge(merge(base, own), dict(over)), f"{where}: run {name}")
    return asked


def _checked(asked: dict[str, Any], where: str) -> dict[str, Any]:
    """`asked` itself. Raises ConfigError for what are no settings of a run."""
    if "output" in asked:
        raise ConfigError(
            f"{where}: output {asked['output']!r}: expected none, as each run lies in --output by its name"
        )
    if "method" not in asked:
        raise ConfigError(f"{where}: it has no method, nor has base: name the draft, as method: eagle3")
    convert(asked, RunConfig, where)
    return asked


def _nested(settings: Any, where: str) -> dict[str, Any]:
    """`settings` with paths as keys spelt out. Raises ConfigError for what is no mapping, and for a key twice."""
    if not isinstance(settings, dict):
        raise ConfigError(f"{where} is {settings!r}: expected settings, as draft.num_taps: 5")
    result: dict[str, Any] = {}
    for path, value in settings.items():
        *above, last = str(path).split(".")
        if not all((*above, last)):
            raise ConfigError(f"{where}: {path!r}: expected a path like train.lr")
        at = result
        for key in above:
            at = at.setdefault(key, {})
            if not isinstance(at, dict):
                raise ConfigError(f"{where}: {path} and {key} are both given: keep one of them")
        old = at.get(last, {})
        if last in at and not (isinstance(old, dict) and isinstance(value, dict) and not old.keys() & value.keys()):
            raise ConfigError(f"{where}: {path} is given twice: keep one of them")
        at[last] = {**old, **value} if isinstance(value, dict) else value
    return result
