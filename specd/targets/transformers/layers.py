"""Where the decoder layers of a transformers model lie, and what each one puts out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from specd.errors import TargetError, first_line

logger = logging.getLogger(__name__)


def find_decoder(network: PreTrainedModel) -> Any:
    """The part of a model that makes hidden states of token ids, without its lm_head and its encoders."""
    found: Any = network.get_decoder()  # type: ignore[no-untyped-call]
    if found is not network and isinstance(found, PreTrainedModel):
        return found
    inner = network.base_model  # some take another part for the decoder, as what they call their head
    return getattr(network, "model", network) if inner is network else inner


def find_layers(decoder: torch.nn.Module, num_layers: int, name: str) -> Sequence[torch.nn.Module]:
    """The list of the decoder's `num_layers` layers, whatever it is called (`layers`, `h`, `blocks`, `encoder.layer`).

    The outermost list of that length is it; of several there, the first. name: of the target, for the error. Raises
    TargetError where there is none.
    """
    lists = [(path, part) for path, part in decoder.named_modules() if isinstance(part, torch.nn.ModuleList)]
    found = [(path.count("."), path) for path, part in lists if len(part) == num_layers]
    if not found:
        seen = ", ".join(f"{path} ({len(part)})" for path, part in lists[:4]) or "none"
        raise TargetError(
            f"target {name}: {type(decoder).__name__} has no list of its {num_layers} decoder layers to tap (lists of "
            f"modules there: {seen}); take another target, or try --backend sglang"
        )
    outermost = min(depth for depth, _ in found)
    chosen = next(path for depth, path in found if depth == outermost)
    layers: Any = decoder.get_submodule(chosen)
    return list(layers)


def residual(output: Any, name: str) -> torch.Tensor:
    """The states [T, H] in what a layer returned for one row of T tokens; name: of the target.

    Raises TargetError where that is no stream of one vector a token.
    """
    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3 or hidden.shape[0] != 1:
        shape = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
        raise TargetError(
            f"target {name}: its layers put out {shape}, expected one vector a token [1, T, H]; such a target "
            f"cannot be tapped here: take another one, or try --backend sglang"
        )
    return hidden[0]


def use_grouped_experts(network: PreTrainedModel) -> None:
    """Mixture-of-experts layers as one grouped matmul. Needs compute capability 8.0 on CUDA."""
    if not hasattr(network.config.get_text_config(decoder=True), "num_experts_per_tok"):
        return
    grouped = network.device.type == "cpu" or torch.cuda.get_device_capability(network.device) >= (8, 0)
    if not hasattr(network, "set_experts_implementation"):
        logger.warning("this transformers has no set_experts_implementation: experts run one by one; update it")
        return
    try:
        network.set_experts_implementation("grouped_mm" if grouped else "eager")
    except ValueError as error:  # experts of the model's own making
        logger.info("experts run as %s has them: %s", type(network).__name__, first_line(error))


def artifact_tensors(network: PreTrainedModel, name: str) -> dict[str, torch.Tensor]:
    """`embedding` and `lm_head`, both [V, H]; name: of the target. Raises TargetError for other shapes."""
    model: Any = network  # its getters are untyped
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    tensors: dict[str, torch.Tensor] = {"embedding": embedding, "lm_head": embedding if head is None else head.weight}
    hidden_size = model.config.get_text_config(decoder=True).hidden_size
    for key, tensor in tensors.items():
        if tensor.ndim != 2 or tensor.shape[1] != hidden_size:
            raise TargetError(
                f"target {name}: its {key} is {list(tensor.shape)}, expected [vocabulary, {hidden_size}], which drafts "
                f"share; take another target"
            )
    return tensors
