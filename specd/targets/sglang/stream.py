"""Whether what SGLang's layers return as residual is a part of the stream, or only looks so."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch


def residual_is_ignored(layers: Sequence[torch.nn.Module], final: Callable[[], torch.Tensor], bound: float) -> bool:
    """Whether no layer takes notice of the residual it is given: then a layer's hidden states are the whole stream.

    LFM2's and Granite's hybrids return a residual that they have added already. final: runs a forward and gives what
    lm_head reads; it runs twice, the second time with residuals of zeros. bound: relative to the largest of it.
    """
    signatures = [inspect.signature(layer.forward) for layer in layers]
    if not all("residual" in signature.parameters for signature in signatures):
        return False
    taken = 0

    def empty(layer: int) -> Any:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal taken
            given = signatures[layer].bind(*args, **kwargs)
            residual = given.arguments.get("residual")
            if not isinstance(residual, torch.Tensor):
                return None
            taken += 1
            given.arguments["residual"] = torch.zeros_like(residual)
            return given.args, given.kwargs

        return hook

    before = final().float()
    handles = [module.register_forward_pre_hook(empty(layer), with_kwargs=True) for layer, module in enumerate(layers)]
    try:
        after = final().float()
    finally:
        for handle in handles:
            handle.remove()
    return taken > 0 and torch.allclose(after, before, rtol=0, atol=bound * float(before.abs().max()))
