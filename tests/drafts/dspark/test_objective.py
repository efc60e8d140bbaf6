"""The DSpark objective: loss, gradients and metrics against a rewrite of the definition, prediction by prediction."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from drafts import make_batch, taps_of
from dspark import CONFIG, deliver, make_dspark, strong
from specd.drafts.dspark.objective import DSpark
from specd.drafts.dspark.settings import DSparkConfig
from specd.protocol.batch import Delivery


def slowly(
    objective: DSpark, delivery: Delivery, scale: float = 1.0, cap: float = 0.0
) -> tuple[Tensor, float, dict[str, list[float]]]:
    """The loss, its weight and the metrics, from the states of the blocks, which the backbone's tests look at."""
    config, batch, drawn, final = objective.config, delivery.batch, objective.draw(delivery.batch), delivery.final
    assert isinstance(config, DSparkConfig)
    assert final is not None
    tokens, positions, context = (
        torch.from_numpy(part) for part in (drawn.tokens, drawn.positions, drawn.context_positions)
    )
    noise, attend = objective.draft.scaled(objective.embedding[tokens]), objective.attention(drawn.layout)
    states = objective.module(taps_of(delivery).flatten(1), context, noise, positions, attend)
    parts, size, head = dict(objective.module.named_parameters()), config.block_size, objective.lm_head
    first, second = (parts[f"markov_head.markov_w{number}.weight"] for number in (1, 2))
    ends, total, weight = np.cumsum(batch.lengths), torch.zeros(()), 0.0
    names = ("correct", "accepted", "cross_entropy", "confidence_error", "counted")
    metrics = {name: [0.0] * size for name in names}

    def logits(state: Tensor, gained: Tensor | float = 0.0) -> Tensor:
        found = (head @ state + gained) * scale
        return torch.tanh(found / cap) * cap if cap else found

    for block, anchor in enumerate(drawn.layout.anchors.tolist()):
        end = int(ends[np.searchsorted(ends, anchor, side="right")])
        for slot in range(size):
            place = anchor + slot
            if place + 1 >= end or not batch.loss_mask[place + 1]:
                break  # whatever comes behind it
            state, before, label = (
                states[block * size + slot],
                first[int(batch.tokens[place])],
                int(batch.tokens[place + 1]),
            )
            ours = logits(state, second @ before)
            shares, theirs = ours.softmax(0), logits(final[place]).softmax(0)
            accepted = torch.minimum(shares, theirs).sum()
            sure = (
                parts["confidence_head.proj.weight"][0] @ torch.cat((state, before))
                + parts["confidence_head.proj.bias"]
            )
            confidence = F.binary_cross_entropy_with_logits(sure[0], accepted.detach())
            terms = config.ce_weight * -shares[label].log() + config.l1_weight * (shares - theirs).abs().sum()
            factor = float(np.exp(-slot / config.loss_decay)) if config.loss_decay else 1.0
            total = total + factor * (terms + config.confidence_weight * confidence)
            weight += factor
            values = (ours.argmax() == label, accepted, -shares[label].log(), (sure[0].sigmoid() - accepted).abs(), 1)
            for name, value in zip(names, values, strict=True):
                metrics[name][slot] += torch.as_tensor(value).item()
    return total, weight, metrics


@pytest.mark.parametrize(
    ("changes", "transform"),
    [
        ({}, {}),
        ({"loss_decay": 0.0, "ce_weight": 0.5, "confidence_weight": 0.3}, {}),
        ({"sliding_window": 6, "block_size": 3, "num_anchors": 50}, {}),
        ({}, {"scale": 0.25, "cap": 3.0}),
    ],
)
def test_loss_gradients_and_metrics_equal_a_rewrite(changes: dict[str, Any], transform: dict[str, float]) -> None:
    figures = {"embedding_scale": 1.0, "logit_scale": 0.25, "logit_softcap": 3.0} if transform else None
    objective = strong(make_dspark(msgspec.structs.replace(CONFIG, **changes), figures=figures))
    delivery = deliver(make_batch())
    wanted, weight, metrics = slowly(objective, delivery, **transform)
    names, parameters = zip(*objective.module.named_parameters(), strict=True)
    slopes = torch.autograd.grad(wanted, parameters)
    loss = objective.loss(delivery)
    torch.testing.assert_close(loss.sum, wanted, rtol=1e-5, atol=1e-4)
    assert float(loss.weight) == pytest.approx(weight, rel=1e-6)
    assert loss.metrics.keys() == metrics.keys()
    for name, values in metrics.items():
        assert loss.metrics[name].tolist() == pytest.approx(values, rel=1e-4, abs=1e-5), name
    assert 0 < sum(metrics["correct"]) < sum(metrics["counted"])
    for name, found, slope in zip(names, torch.autograd.grad(loss.sum, parameters), slopes, strict=True):
        torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-4 * float(slope.abs().max()), msg=name)


def test_a_prediction_behind_a_hole_does_not_count() -> None:
    objective, batch = make_dspark(msgspec.structs.replace(CONFIG, num_anchors=50)), make_batch((12,), 1.1)
    mask = np.ones(12, np.bool_)
    mask[5] = False
    drawn = objective.draw(msgspec.structs.replace(batch, loss_mask=mask))
    counting = np.bincount(drawn.rows // CONFIG.block_size, minlength=len(drawn.layout.anchors))
    left = {0: 4, 1: 3, 2: 2, 3: 1, 6: 5, 7: 4, 8: 3, 9: 2, 10: 1}  # tokens up to the hole, the end or the block's
    assert dict(zip(drawn.layout.anchors.tolist(), counting.tolist(), strict=True)) == left
    assert drawn.labels[:4].tolist() == batch.tokens[1:5].tolist()
    assert drawn.offsets[:4].tolist() == [1, 2, 3, 4]


def test_an_empty_batch_gives_every_parameter_a_gradient_of_zero() -> None:
    objective, batch = strong(make_dspark()), make_batch((6, 4))
    loss = objective.loss(deliver(msgspec.structs.replace(batch, loss_mask=np.zeros(10, np.bool_))))
    loss.sum.backward()  # type: ignore[no-untyped-call]
    assert (loss.sum.item(), loss.weight.item()) == (0.0, 0.0)
    assert all(part.grad is not None and not part.grad.any() for part in objective.module.parameters())
