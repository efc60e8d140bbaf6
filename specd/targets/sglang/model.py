"""A model of SGLang's: where its parts lie, and dummy weights that compute something."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import torch

from specd.errors import TargetError

NORMS: Final = ("norm", "norm_f", "final_layernorm", "embedding_norm")
"""What models call their last norm."""


class Parts(msgspec.Struct, frozen=True):
    """The modules in use. head: the logits_processor, which is called with what lm_head reads."""

    layers: Sequence[torch.nn.Module]
    norm: torch.nn.Module
    embedding: torch.nn.Module
    lm_head: torch.nn.Module
    head: torch.nn.Module


def parts(model: Any) -> Parts:
    """The parts of a causal LM, bare or inside a wrapper for images. Raises TargetError when they lie elsewhere."""
    outer = next((found for name in ("language_model", "thinker") if (found := getattr(model, name, None))), model)
    decoder = outer
    for name in ("model", "language_model", "model"):
        if not hasattr(decoder, "layers"):
            decoder = getattr(decoder, name, decoder)
    norm = next((name for name in NORMS if hasattr(decoder, name)), "norm")
    try:
        return Parts(
            layers=decoder.layers,
            norm=getattr(decoder, norm),
            embedding=decoder.embed_tokens,
            lm_head=outer.lm_head if hasattr(outer, "lm_head") else model.lm_head,
            head=outer.logits_processor if hasattr(outer, "logits_processor") else model.logits_processor,
        )
    except AttributeError as error:
        raise TargetError(
            f"SGLang's {type(model).__name__} is not laid out as expected ({error}): expected model.layers, "
            f"model.norm, model.embed_tokens, lm_head and logits_processor; use --backend transformers"
        ) from error


def liven(model: torch.nn.Module, rank: int) -> None:
    """Redraw dummy weights: SGLang's are uniform ±1e-3, its norms and convolutions too, so that states vanish and all
    tokens take the same experts. Recurrent layers get a memory of some twenty tokens."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.fill_(1)
            elif name.endswith("A_log"):
                weight.fill_(0)
            elif name.endswith("dt_bias"):
                weight.fill_(-3)
            elif "conv" in name.split(".")[-2:][0] and weight.ndim > 1:
                weight.normal_(0, 0.5, generator=_generator(weight, name, rank))
            elif name.endswith(("mlp.gate.weight", "embed_tokens.weight", "lm_head.weight")):
                shard = 0 if name.endswith("gate.weight") else rank  # every rank has the whole router
                weight.normal_(0, 0.02, generator=_generator(weight, name, shard))


def _generator(weight: torch.Tensor, name: str, shard: int) -> torch.Generator:
    return torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode(), shard))
