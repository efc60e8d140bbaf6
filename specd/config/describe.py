"""What each setting means, read from the docstrings of the structs, and which one a wrong key may have meant."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any, get_args

import msgspec

STEM = 6
"""Letters by which two words are the same: gradient, gradients."""


@functools.cache
def meanings(kind: type[msgspec.Struct]) -> dict[str, str]:
    """Field -> its meaning, from a docstring of the form `name: what it is. other, more: what they are.`

    What a base says of its fields holds for those that inherit them.
    """
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base is not msgspec.Struct and issubclass(base, msgspec.Struct):
            found |= _said(base)
    return found


def _said(kind: type[msgspec.Struct]) -> dict[str, str]:
    text = " ".join(inspect.cleandoc(kind.__doc__ or "").split())
    name = "|".join(sorted((field.name for field in msgspec.structs.fields(kind)), key=len, reverse=True))
    if not name:
        return {}
    heads = list(re.finditer(rf"(?:^|(?<=[.;] ))((?:{name})(?:, (?:{name}))*): ", text))
    found: dict[str, str] = {}
    for head, after in zip(heads, [*heads[1:], None], strict=False):
        meaning = text[head.end() : after.start() if after else None].strip().rstrip(".")
        found |= dict.fromkeys(head[1].split(", "), meaning)
    return found


def summary(kind: type[msgspec.Struct]) -> str:
    """The first sentence of a struct's docstring."""
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def section_of(annotation: Any) -> type[msgspec.Struct] | None:
    """The struct that a field holds, None for a plain value."""
    kinds = [annotation, *get_args(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, msgspec.Struct)), None)


def settings(kind: type[msgspec.Struct], at: str = "") -> Iterator[tuple[str, msgspec.structs.FieldInfo, str]]:
    """All plain settings under a struct: the path of each, its field and its meaning."""
    for field in msgspec.structs.fields(kind):
        path = f"{at}{field.encode_name}"
        if (section := section_of(field.type)) is not None:
            yield from settings(section, f"{path}.")
        else:
            yield path, field, meanings(kind).get(field.name, "")


def meant(key: str, at: str, kind: type[msgspec.Struct]) -> str:
    """The setting that a wrong `key` in the section `at` of `kind` most likely stands for, by its path; empty for none.

    By spelling in its own section first, then anywhere, then by its words in what settings mean.
    """
    known = {path: meaning for path, _, meaning in settings(kind)}
    own = [path for path in known if path.startswith(at) and "." not in path[len(at) :]]
    for paths in (own, list(known)):
        names = {path.rpartition(".")[2]: path for path in reversed(paths)}
        if close := difflib.get_close_matches(key.lower().replace("-", "_"), names, n=1, cutoff=0.75):
            return names[close[0]]
    stems = [word[:STEM] for word in re.split(r"[_\W]+", key.lower()) if word]
    for paths in (own, list(known)):
        for path in paths:
            said = known[path] if len(stems) > 1 else ""  # one word may stand in any meaning
            words = re.findall(r"[a-z0-9]+", f"{path.rpartition('.')[2].replace('_', ' ')} {said}".lower())
            if all(any(word.startswith(stem) for word in words) for stem in stems):
                return path
    return ""
