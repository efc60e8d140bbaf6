"""The DFlash2 objective: loss, gradients and metrics against a rewrite of the definition, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from dflash2 import CONFIG, make_dflash2, strong
from drafts import deliver, make_batch, taps_of
from specd.drafts.backbone.weighting import weighted
from specd.drafts.dflash2.objective import DFlash2
from specd.protocol.batch import Delivery


def states_of(objective: DFlash2, delivery: Delivery) -> Tensor:
    """States of all tokens of a batch's blocks, which the backbone's tests look at."""
    drawn = objective.draw(delivery.batch)
    tokens, positions, context = (
        torch.from_numpy(part) for part in (drawn.tokens, drawn.positions, drawn.context_positions)
    )
    noise, attend = objective.draft.scaled(objective.embedding[tokens]), objective.attention(drawn.layout)
    states: Tensor = objective.module(taps_of(delivery).flatten(1), context, noise, positions, attend)
    return states


def slowly(
    objective: DFlash2, delivery: Delivery, scale: float = 1.0, cap: float = 0.0
) -> tuple[Tensor, dict[str, int]]:
    """The loss row by row, and how many rows were right, covered and so on."""
    config, batch, blocks = objective.config, delivery.batch, objective.draw(delivery.batch)
    states, parts = states_of(objective, delivery), dict(objective.module.named_parameters())
    first, second, asked = (
        parts[f"candidate_selector.{name}"]
        for name in ("predecessor_codebook", "successor_codebook", "hidden_projection.weight")
    )
    rows = torch.from_numpy(blocks.rows)
    logits = states[rows] @ objective.lm_head.T * scale
    logits = torch.tanh(logits / cap) * cap if cap else logits
    losses = -logits.log_softmax(-1)[torch.arange(len(rows)), torch.from_numpy(blocks.labels)]
    weights, _ = weighted(config, blocks, losses.detach(), rows)
    total, counts = (losses * weights).sum(), {"correct": 0, "unary_correct": 0, "covered": 0, "counted": len(rows)}
    for index, (row, label, offset) in enumerate(zip(blocks.rows, blocks.labels, blocks.offsets, strict=True)):
        best = logits[index].topk(config.selector_top_k).indices  # type: ignore[attr-defined]
        before = int(batch.tokens[blocks.layout.anchors[row // config.block_size] + offset - 1])
        scores = torch.stack(
            [logits[index, one] + (first[before] * (asked @ states[row])) @ second[one] for one in best]
        )
        counts["unary_correct"] += int(best[0] == label)
        counts["correct"] += int(best[scores.argmax()] == label)
        counts["covered"] += int(label in best)
        if label in best:
            own = best.tolist().index(label)
            total = total - config.selector_weight * weights[index] * scores.log_softmax(0)[own]  # type: ignore[attr-defined]
    return total, counts


def same(objective: DFlash2, delivery: Delivery, **transform: float) -> Mapping[str, Tensor]:
    """Compare loss, metrics and gradients; returns the metrics."""
    wanted, counts = slowly(objective, delivery, **transform)
    names, parameters = zip(*objective.module.named_parameters(), strict=True)
    slopes = torch.autograd.grad(wanted, parameters)
    loss = objective.loss(delivery)
    torch.testing.assert_close(loss.sum, wanted, rtol=1e-5, atol=1e-4)
    assert {name: int(loss.metrics[name].sum()) for name in counts} == counts
    for name, found, slope in zip(names, torch.autograd.grad(loss.sum, parameters), slopes, strict=True):
        torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-4 * float(slope.abs().max()), msg=name)
    return loss.metrics


@pytest.mark.parametrize(
    "changes",
    [{}, {"loss": "decay", "loss_decay": 3.0, "selector_weight": 0.4}, {"sliding_window": 5, "conv_kernel_size": 3}],
)
def test_loss_gradients_and_metrics_equal_a_rewrite(changes: dict[str, Any]) -> None:
    objective = strong(make_dflash2(msgspec.structs.replace(CONFIG, **changes)))
    metrics = same(objective, deliver(make_batch()))
    assert 0 < metrics["covered"].sum() < metrics["counted"].sum()


def test_the_selector_sees_logits_as_the_target_makes_them() -> None:
    figures = {"embedding_scale": 1.0, "logit_scale": 0.25, "logit_softcap": 3.0}
    same(strong(make_dflash2(figures=figures)), deliver(make_batch()), scale=0.25, cap=3.0)


def test_it_counts_what_is_drafted() -> None:
    """Where the selector is sure, its pick is right or wrong, whatever the head says."""
    objective = strong(make_dflash2(msgspec.structs.replace(CONFIG, selector_top_k=97)))
    for name, parameter in objective.module.named_parameters():
        if name.endswith("successor_codebook"):
            parameter.data.mul_(100)
    metrics = same(objective, deliver(make_batch()))
    assert metrics["covered"].tolist() == metrics["counted"].tolist()
    assert metrics["correct"].tolist() != metrics["unary_correct"].tolist()


def test_an_empty_batch_gives_every_parameter_a_gradient_of_zero() -> None:
    objective, batch = strong(make_dflash2()), make_batch((6, 4))
    loss = objective.loss(deliver(msgspec.structs.replace(batch, loss_mask=np.zeros(10, np.bool_))))
    loss.sum.backward()  # type: ignore[no-untyped-call]
    assert (loss.sum.item(), loss.weight.item()) == (0.0, 0.0)
    assert all(part.grad is not None and not part.grad.any() for part in objective.module.parameters())
