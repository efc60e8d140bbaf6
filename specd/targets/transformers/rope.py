"""Rotary embeddings whose frequencies follow from how long a forward is: LongRoPE and dynamic NTK."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

BY_LENGTH = ("longrope", "dynamic")
"""The types of transformers that choose frequencies by the longest position of a forward."""
_STATE = ("inv_freq", "max_seq_len_cached")
"""How the names of the attributes end that such an embedding changes in a forward."""


class Rope:
    """The rotary embeddings of a decoder that depend on a forward's length.

    limit: sequences up to so many tokens use the frequencies that all short ones do; 0 where no length matters.
    transformers keeps the frequencies of a long forward for later shorter ones, so `reset` comes before each.
    """

    __slots__ = ("_fresh", "limit")

    def __init__(self, decoder: torch.nn.Module) -> None:
        self._fresh = [(part, _state(part)) for part in decoder.modules() if _by_length(part)]
        self.limit = min((limit for part, _ in self._fresh for limit in _limits(part)), default=0)

    def reset(self) -> None:
        """Put the frequencies back to those of a model that has seen nothing yet."""
        for part, state in self._fresh:
            for name, value in state.items():
                setattr(part, name, value)


def _by_length(part: Any) -> bool:
    kinds = getattr(part, "rope_type", None)
    names = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    return any(isinstance(name, str) and name.startswith(BY_LENGTH) for name in names)


def _state(part: torch.nn.Module) -> dict[str, Any]:
    named = {**vars(part), **dict(part.named_buffers(recurse=False))}
    return {name: value for name, value in named.items() if name.endswith(_STATE)}


def _limits(part: Any) -> Iterator[int]:
    """Up to which lengths an embedding leaves its frequencies alone."""
    settings = part.config.get_text_config()
    rope = getattr(settings, "rope_parameters", None) or {}
    for entry in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        if length := entry.get("original_max_position_embeddings"):
            yield int(length)
    for length in (getattr(part, "original_max_seq_len", None), getattr(part, "max_seq_len_cached", None)):
        if length:
            yield int(length)
