"""What torch's flex_attention computes, score by score, with the gradients that it has on GPUs only; and its graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest


def dense_flex(
    query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any, return_aux: AuxRequest, kernel_options: Any
) -> tuple[Tensor, AuxOutput]:
    """query [B, H, rows, D], key and value [1, H, keys, D] -> [B, H, rows, D] and its log-sum-exp [B, H, rows].

    A score is hidden by the mask's function, and by a tile that the mask does not visit.
    """
    assert return_aux.lse
    assert kernel_options == {"FORCE_USE_FLEX_ATTENTION": True}
    assert block_mask.shape[0] == query.shape[0]
    rows, keys = query.shape[2], key.shape[2]
    row, column = torch.arange(rows)[:, None], torch.arange(keys)[None]
    visited = block_mask.to_dense()[0, 0].bool().repeat_interleave(128, 0).repeat_interleave(128, 1)
    visible = block_mask.mask_mod(row, row, row, column) & visited
    scores = (query @ key.mT * query.shape[-1] ** -0.5).float().masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp().to(value.dtype) @ value), AuxOutput(lse=lse)


def noting(known: list[bool]) -> Callable[[torch.fx.GraphModule, Any], Any]:
    """A compiler that compiles nothing, and notes for each graph of flex_attention whether lengths are whole tiles."""

    def note(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if "flex_attention" in str(node.target):
                shapes = [argument.meta["example_value"].shape for argument in node.args[:2]]
                known.append(all(statically_known_true(shape[2] % 128 == 0) for shape in shapes))
        return graph.forward

    return note
