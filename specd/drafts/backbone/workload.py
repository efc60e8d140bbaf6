"""What a training step of a block draft costs: useful operations by part, and its attention alone, for the benchmark.

Shape legend: N block tokens, Q query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from specd.drafts.backbone.objective import BlockObjective
from specd.drafts.backbone.shape import BlockShape
from specd.drafts.base import Workload
from specd.drafts.blocks import Blocks
from specd.protocol.batch import Batch


def workload(objective: BlockObjective, batch: Batch) -> Workload:
    """What a step of `batch` costs."""
    blocks = objective.draw(batch)
    return Workload(
        rows=len(blocks.tokens),
        predictions=len(blocks.rows),
        flops=useful_flops(objective.draft.shape, batch.num_tokens, blocks),
        parts={"attention": _attention(objective, blocks)},
    )


def useful_flops(shape: BlockShape, num_context: int, blocks: Blocks) -> dict[str, float]:
    """Floating point operations of one step, forward and backward, by part; a multiplication and addition are two.

    What the mask hides is not counted, nor what is computed again in a backward, nor gradients that are not needed: of
    the taps and of the head's weights.
    """
    hidden, kv = shape.hidden_size, shape.num_kv_heads * shape.head_dim
    heads = shape.num_heads * shape.head_dim
    rows, layers = len(blocks.tokens), shape.num_layers
    product = 2.0 * hidden * rows
    seen = 0
    for kind in shape.layer_types:
        visible = blocks.layout.anchors[:, None] - blocks.layout.visible_from(shape.window(kind))
        inside = blocks.layout.seen_inside(shape.causal(kind)).sum() * len(blocks.layout.anchors)
        seen += int(np.maximum(visible, 0).sum() + inside)
    head = 2.0 * len(blocks.rows) * hidden * shape.vocab_size
    return {
        "fc": 2 * 2.0 * num_context * len(shape.taps) * hidden * hidden,
        "context keys and values": 3 * layers * 2.0 * num_context * hidden * 2 * kv,
        "attention projections": 3 * layers * product * (2 * heads + 2 * kv),
        "attention": 3 * 2 * 2.0 * seen * heads,
        "mlp": 3 * layers * 3 * product * shape.intermediate_size,
        "head": head,
        "head's gradient": head,
    }


def _attention(objective: BlockObjective, blocks: Blocks) -> Callable[[], None]:
    """Attention of all layers on random states, forward and backward, its kernels and masks as in the step."""
    shape, device, dtype = objective.draft.shape, objective.device, objective.embedding.dtype
    attend = objective.attention(blocks.layout)
    generator = torch.Generator(device).manual_seed(2)

    def states(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(
            tokens, heads, shape.head_dim, device=device, dtype=dtype, generator=generator, requires_grad=True
        )

    rows, context, kv = len(blocks.tokens), blocks.layout.num_context, shape.num_kv_heads
    query = states(rows, shape.num_heads)
    own, far = (states(rows, kv), states(rows, kv)), (states(context, kv), states(context, kv))
    grad = torch.randn(query.shape, device=device, dtype=dtype, generator=generator)

    def once() -> None:
        for kind in shape.layer_types:
            out = attend(query, own, far, shape.window(kind), shape.causal(kind))
            torch.autograd.grad(out, (query, *own, *far), grad)

    return once
