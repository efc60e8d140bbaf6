"""EAGLE-3 from its definition, row by row and without caches, beside a tiny draft and batches for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from drafts import CONTRACT, HIDDEN, TARGET, VOCAB
from specd.drafts.base import TargetParts
from specd.drafts.eagle3.model import Eagle3Draft
from specd.drafts.eagle3.objective import Eagle3
from specd.drafts.eagle3.settings import Eagle3Config
from specd.protocol.batch import Batch, Delivery

CONFIG = Eagle3Config(num_steps=4, draft_vocab_size=60, loss_chunk=5)
COUNTS = np.random.default_rng(3).integers(0, 50, VOCAB)


def parts(figures: Mapping[str, Any] | None = None, **changes: Any) -> TargetParts:
    """figures: changes of the contract; others are of config.json."""
    contract = msgspec.structs.replace(CONTRACT, **figures or {})
    generator = torch.Generator().manual_seed(1)
    embedding, head = (torch.randn(VOCAB, HIDDEN, generator=generator) for _ in range(2))
    return TargetParts(contract, {**TARGET, "model_type": "llama", **changes}, embedding, head, COUNTS)


def make_eagle(
    config: Eagle3Config = CONFIG, seed: int = 0, shape: dict[str, Any] | None = None, **changes: Any
) -> Eagle3:
    """Matrices ten times those of training, so that all of it matters.

    shape: changes of the draft's shape that settings cannot say, but drafts of others have.
    """
    found = Eagle3(config, parts(**changes), seed=seed)
    if shape:
        draft = found.draft
        found.draft = Eagle3Draft(msgspec.structs.replace(draft.shape, **shape), seed, draft.vocabulary)
        found.draft.start_head(found.lm_head)
        found.module = found.draft
    with torch.no_grad():
        for name, parameter in found.module.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()))
            elif name != "lm_head.weight":
                parameter.mul_(10)
    return found


def deliver(batch: Batch, seed: int = 2) -> Delivery:
    states = torch.randn(batch.num_tokens, 4, HIDDEN, generator=torch.Generator().manual_seed(seed))
    return Delivery(batch, states[:, :3], states[:, 3])


def rotated(x: Tensor, position: int, theta: float) -> Tensor:
    """x [heads, D] at a position: pairs (i, i + D/2) turn by position / theta^(2i/D)."""
    size = x.shape[-1] // 2
    angle = position / theta ** (torch.arange(size) / size)
    first, second = x[:, :size], x[:, size:]
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat(turned, -1)


def chain(
    draft: Eagle3Draft, embedding: Tensor, tokens: Sequence[int], taps: Tensor, row: int, steps: int
) -> list[Tensor]:
    """What lm_head reads at each step of one row of one sequence; `tokens` must reach row + steps.

    Computed with the keys of all rows before it and with those of the row's own steps, each made anew.
    """
    layer, shape = draft.midlayer, draft.shape
    attention = layer.self_attn

    def normed(x: Tensor, norm: Any) -> Tensor:
        gain: Tensor = norm.weight
        return x * (x.pow(2).mean(-1, keepdim=True) + shape.rms_norm_eps).rsqrt() * gain

    def first(at: int) -> Tensor:
        pieces = list(taps[at].chunk(len(shape.taps)))
        if shape.fc_norm:
            pieces = [normed(piece, norm) for piece, norm in zip(pieces, draft.fc_norm, strict=True)]
        together = torch.cat(pieces)
        return draft.fc.weight @ (normed(together, draft.input_norm) if shape.norm_before_fc else together)

    def joined(token: int, state: Tensor) -> Tensor:
        return torch.cat((normed(embedding[token], layer.input_layernorm), normed(state, layer.hidden_norm)))

    def mapped(linear: Any, x: Tensor) -> Tensor:
        found: Tensor = linear.weight @ x
        return found if linear.bias is None else found + linear.bias

    def heads(linear: Any, x: Tensor) -> Tensor:
        return mapped(linear, x).reshape(-1, shape.head_dim)

    keys, values = [], []
    for at in range(row):
        x = joined(tokens[at + 1], first(at))
        keys.append(rotated(heads(attention.k_proj, x), at, shape.rope_theta))
        values.append(heads(attention.v_proj, x))
    state, read = first(row), []
    for step in range(steps):
        x = joined(tokens[row + 1 + step], state)
        keys.append(rotated(heads(attention.k_proj, x), row + step, shape.rope_theta))
        values.append(heads(attention.v_proj, x))
        query = rotated(heads(attention.q_proj, x), row + step, shape.rope_theta)
        found = []
        for head, one in enumerate(query):
            group = head // (shape.num_heads // shape.num_kv_heads)
            shares = torch.stack([one @ key[group] for key in keys]).mul(shape.head_dim**-0.5).softmax(0)
            found.append(sum(share * value[group] for share, value in zip(shares, values, strict=True)))
        after = normed(state, layer.hidden_norm) if shape.norm_before_residual else state
        after = after + mapped(attention.o_proj, torch.cat(found))
        inner, mlp = normed(after, layer.post_attention_layernorm), layer.mlp
        after = after + mlp.down_proj.weight @ (F.silu(mlp.gate_proj.weight @ inner) * (mlp.up_proj.weight @ inner))
        read.append(normed(after, draft.norm))
        state = read[-1] if shape.norm_output else after
    return read


def reference(objective: Eagle3, delivery: Delivery) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sum, and how many predictions count and are right at each step, [steps], from the definition."""
    draft, batch, config = objective.draft, delivery.batch, objective.config
    assert delivery.taps is not None
    assert delivery.final is not None
    counted, correct = torch.zeros(2, config.num_steps)
    total = sum(parameter.sum() * 0 for parameter in draft.parameters())
    own = draft.vocabulary.tolist()
    begin = 0
    for length in batch.lengths.tolist():
        part = slice(begin, begin + length)
        tokens, mask = batch.tokens[part].tolist(), batch.loss_mask[part].tolist()
        taps, final = delivery.taps[part].flatten(1), delivery.final[part]
        for row in range(length):
            steps = min(config.num_steps, length - row - 2)
            read = chain(draft, objective.embedding, tokens, taps, row, steps) if steps > 0 else []
            for step, states in enumerate(read):
                teacher, predicted = row + 1 + step, row + 2 + step
                logits = objective.lm_head @ final[teacher]
                best = int(logits.argmax())
                if not (mask[teacher] and mask[predicted] and best in own):
                    continue
                target = objective.transform(logits)[draft.vocabulary].softmax(0)
                logs = (draft.lm_head.weight @ states).log_softmax(0)
                total = total - config.loss_decay**step * (target * logs).sum()
                counted[step] += 1
                correct[step] += own[int(logs.argmax())] == best
        begin += length
    assert isinstance(total, Tensor)
    return total, counted, correct
