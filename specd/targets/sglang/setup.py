"""Messages to the ranks of an SGLang target: how to load, and what to run."""

from __future__ import annotations

from typing import Final

import msgspec

AT_HEAD: Final = -1
"""Step.stop of a forward that ends where lm_head would begin."""


class RankSetup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one rank needs to load. path: a directory with config.json. gpu: that of rank 0; rank r has gpu + r.

    port: rendezvous of the ranks of this host. max_tokens, context: the longest forward and sequence, in tokens.
    prefill_graphs: tokens of the forwards to record, ascending.
    """

    path: str
    load_format: str
    dtype: str
    device: str
    gpu: int
    tp: int
    port: int
    memory_fraction: float
    attention_backend: str
    max_tokens: int
    context: int
    prefill_graphs: tuple[int, ...] = ()
    rank: int = 0
    parent_pid: int = 0


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One forward: little-endian int32 tokens, lengths of the sequences, the layer it ends after, or AT_HEAD, and the
    tapped layers: every rank finishes their outputs. payloads: of each sequence, () if none brings anything.
    """

    tokens: bytes
    lengths: list[int]
    stop: int
    taps: tuple[int, ...] = ()
    payloads: tuple[bytes, ...] = ()
