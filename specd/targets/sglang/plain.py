"""The states of an SGLang model's layers by another way than the tap hooks: what each layer hands to the next."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from specd.targets.sglang.capture import Capture
from specd.targets.sglang.engine import Engine
from specd.targets.sglang.setup import AT_HEAD


def handed_on(engine: Engine, tokens: NDArray[np.int32], announce: Callable[[], None]) -> NDArray[np.float32] | None:
    """Run one sequence: float32 [L − 1, T, H], the inputs of layers 1 … L − 1. None where they cannot be read.

    They can where layers take `residual`, which is to be added to what they take besides, unless they ignore it.
    announce: tells the other ranks of the forward; not called where there is none.
    """
    layers = list(engine.layers)
    signatures = [inspect.signature(layer.forward) for layer in layers]
    if not all("residual" in signature.parameters for signature in signatures):
        return None
    found: dict[int, NDArray[np.float32]] = {}

    def reader(layer: int) -> Any:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = signatures[layer].bind(*args, **kwargs).arguments
            residual = given.pop("residual", None)
            inputs = [
                part
                for part in given.values()
                if isinstance(part, torch.Tensor) and part.ndim == 2 and part.is_floating_point()
            ]
            if len(inputs) == 1 and isinstance(residual, torch.Tensor) and residual.shape == inputs[0].shape:
                added = 0 if engine.hidden_alone else residual.float()
                found[layer - 1] = (inputs[0].float() + added).cpu().numpy()

        return hook

    handles = [
        module.register_forward_pre_hook(reader(layer), with_kwargs=True)
        for layer, module in enumerate(layers)
        if layer > 0
    ]
    try:
        announce()
        engine.forward(tokens, [int(tokens.size)], AT_HEAD, Capture(taps={}, final=[]))
    finally:
        for handle in handles:
            handle.remove()
    if len(found) != len(layers) - 1:
        return None
    return np.stack([found[layer] for layer in range(len(layers) - 1)])
