"""Settings from YAML files and `--set a.b=c`, checked against their structs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec
import yaml

from specd.config.describe import meant, settings
from specd.errors import ConfigError
from specd.paths import shown

T = TypeVar("T")
_OF_0_1_0: dict[str, Any] = {"method": "dflash", "draft": {"loss": "decay"}}
"""What runs of specd 0.1.0 do not name, and did."""


def convert(data: Any, kind: type[T], where: str) -> T:
    """`data` as `kind`. Raises ConfigError that names `where`, the key and what was expected."""
    leaves = [*_leaves(data)]
    for key, value in leaves:
        if isinstance(value, str) and shown(value) != value:
            raise ConfigError(
                f"{where}: {key} '{shown(value)}' is not UTF-8, as all is that is written about a run; give a path "
                f"that is, a link for instance"
            )
    try:
        found = msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        message = _with_key(_with_choices(_with_number(str(error), data), kind), kind)
        raise ConfigError(f"{where}: {message}") from None
    for key, value in leaves:
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{where}: {key} is {value}: expected a finite number")
    return found


def _leaves(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All texts, numbers and other single values in `data`, each with the path of its key."""
    if isinstance(data, dict):
        for name, item in data.items():
            yield from _leaves(item, f"{key}.{name}")
    elif isinstance(data, (list, tuple)):
        for item in data:
            yield from _leaves(item, key)
    else:
        yield key.removeprefix("."), data


def _with_number(message: str, data: Any) -> str:
    """msgspec's message; where a number is out of its range, with that number, which msgspec leaves out."""
    expected, at, path = message.partition(" - at `$")
    if not re.fullmatch(r"Expected `\w+` [<>].*", expected):
        return message
    for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        data = data[key] if key else data[int(index)]
    return f"{expected}, got {data}{at}{path}"


def _with_choices(message: str, kind: Any) -> str:
    """msgspec's message; where a word is none of those of its setting, with these, which msgspec leaves out."""
    wrong, at, path = message.partition(" - at `$")
    if not wrong.startswith("Invalid enum value"):
        return message
    for key in re.findall(r"\.(\w+)", path):
        known = msgspec.structs.fields(kind) if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else ()
        kind = next((field.type for field in known if field.encode_name == key), None)
    choices = [choice for choice in get_args(kind) if isinstance(choice, str)]
    return f"{wrong}, expected one of {', '.join(choices)}{at}{path}" if choices else message


def _with_key(message: str, kind: Any) -> str:
    """msgspec's message; where a key is not known, with the one that was meant, or those that there are."""
    found = re.match(r"Object contains unknown field `([^`]*)`(?: - at `\$\.?([^`]*)`)?", message)
    if not found or not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return message
    key, at = found[1], f"{found[2]}." if found[2] else ""
    if right := meant(key, at, kind):
        return f"{message}; did you mean {right}?"
    own = sorted({path[len(at) :].partition(".")[0] for path, _, _ in settings(kind) if path.startswith(at)})
    return f"{message}; expected one of {', '.join(own)}" if own else message


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.1, but a plain 3e-4 is a number, nothing is a date, and a key that is there twice is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:  # the stubs take it for a dict
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if any(key.value == other.value for other in keys[:number]):
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice: keep one", problem_mark=key.start_mark)
        return node


_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in pairs if tag != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read(text: str) -> Any:
    """Parse YAML text. Raises yaml.YAMLError."""
    loader = _YamlLoader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError when it cannot be read or is no mapping."""
    try:
        data = _read(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config file {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} is not YAML: {error}") from None
    if not isinstance(data, dict):
        kind = "nothing" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"config file {str(path)!r} holds {kind}, expected a mapping of settings")
    return data


def as_begun(config: dict[str, Any]) -> dict[str, Any]:
    """The settings in a run.json, with those that its version did not name as they were then."""
    return config if "method" in config else merge(_OF_0_1_0, config)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` on top, mapping by mapping; neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def overrides(given: Sequence[str]) -> dict[str, Any]:
    """`["a.b=c", …]` as a nested mapping; values are read as YAML. Raises ConfigError for anything else."""
    result: dict[str, Any] = {}
    for setting in given:
        path, equals, text = setting.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise ConfigError(f"--set {setting!r}: expected key.path=value, for example --set train.lr=3e-4")
        try:
            value = _read(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting!r}: the value is not YAML: {error}") from None
        for key in reversed(keys):
            value = {key: value}
        result = merge(result, value)
    return result
