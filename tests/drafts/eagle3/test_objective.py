"""The EAGLE-3 loss is what its definition says, with its gradients, whatever is packed together."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from drafts import make_batch
from eagle import CONFIG, COUNTS, deliver, make_eagle, parts, reference
from specd.drafts.eagle3.objective import Eagle3
from specd.drafts.eagle3.settings import Eagle3Config
from specd.errors import ConfigError


def gradients(objective: Eagle3, total: torch.Tensor) -> dict[str, torch.Tensor]:
    total.backward()  # type: ignore[no-untyped-call]
    found = {
        name: weight.grad.clone() for name, weight in objective.module.named_parameters() if weight.grad is not None
    }
    objective.module.zero_grad()
    return found


@pytest.mark.parametrize(
    ("settings", "target"),
    [
        ({}, {}),
        ({"norm_output": True, "fc_norm": True}, {}),
        ({"draft_vocab_size": 0, "num_steps": 7}, {}),
        ({"num_heads": 2, "num_kv_heads": 1, "loss_decay": 1.0}, {}),
        ({}, {"figures": {"logit_scale": 0.25}}),
        ({}, {"figures": {"logit_scale": 2.0, "logit_softcap": 3.0}}),
    ],
)
@pytest.mark.parametrize(("lengths", "density"), [((30,), 0.85), ((11, 1, 2, 17, 3), 0.8)])
def test_it_is_its_definition(
    settings: dict[str, Any], target: dict[str, Any], lengths: tuple[int, ...], density: float
) -> None:
    objective = make_eagle(msgspec.structs.replace(CONFIG, **settings), **target)
    delivery = deliver(make_batch(lengths, density))
    total, counted, correct = reference(objective, delivery)
    assert counted[0] > 2
    wanted = gradients(objective, total)
    loss = objective.loss(delivery)
    torch.testing.assert_close(loss.sum.detach(), total.detach(), rtol=1e-5, atol=1e-5)
    assert loss.weight == counted[0]
    assert loss.metrics["counted"].tolist() == counted.tolist()
    assert loss.metrics["correct"].tolist() == correct.tolist()
    found = gradients(objective, loss.sum)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert float((gradient - wanted[name]).norm() / wanted[name].norm()) < 2e-5, name


@pytest.mark.parametrize(
    "shape",
    [
        {"norm_before_fc": True, "norm_output": True},
        {"norm_before_residual": True},
        {"attention_bias": True},
    ],
)
def test_what_only_drafts_of_others_have_is_its_definition_too(shape: dict[str, Any]) -> None:
    objective, delivery = make_eagle(shape=shape), deliver(make_batch((11, 2, 9)))
    total, counted, correct = reference(objective, delivery)
    wanted = gradients(objective, total)
    loss = objective.loss(delivery)
    torch.testing.assert_close(loss.sum.detach(), total.detach(), rtol=1e-5, atol=1e-5)
    assert loss.metrics["counted"].tolist() == counted.tolist()
    assert loss.metrics["correct"].tolist() == correct.tolist()
    found = gradients(objective, loss.sum)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert float((gradient - wanted[name]).norm() / wanted[name].norm()) < 2e-5, name


def test_other_sequences_of_a_batch_are_never_seen() -> None:
    """Neither their states nor their tokens reach a loss, at any step, to the bit."""
    objective, batch = make_eagle(), make_batch((9, 12))
    batch.loss_mask[9:] = False
    delivery = deliver(batch)
    before = objective.loss(delivery).sum.detach()
    assert delivery.taps is not None
    assert delivery.final is not None
    delivery.taps[9:], delivery.final[9:] = 1e3, -1e3
    batch.tokens[9:] = 0
    assert torch.equal(objective.loss(delivery).sum.detach(), before)


def test_a_last_token_teaches_nothing() -> None:
    """Its final state predicts what is not in the text."""
    objective, batch = make_eagle(), make_batch((8,), density=1.1)
    delivery = deliver(batch)
    before = objective.loss(delivery)
    assert delivery.final is not None
    delivery.final[-1] = 1e3
    assert torch.equal(objective.loss(delivery).sum, before.sum)
    teachable = np.isin(
        (delivery.final[:-1] @ objective.lm_head.T).argmax(-1).numpy(), objective.draft.vocabulary.numpy()
    )
    assert before.metrics["counted"].tolist() == [teachable[1 + step : 7].sum() for step in range(4)]


def test_no_prediction_reaches_every_weight_with_an_exact_zero() -> None:
    objective, batch = make_eagle(), make_batch((5, 1, 3), density=0)
    loss = objective.loss(deliver(batch))
    assert (float(loss.sum.detach()), float(loss.weight)) == (0.0, 0.0)
    found = gradients(objective, loss.sum)
    assert found.keys() == dict(objective.module.named_parameters()).keys()
    assert not any(gradient.any() for gradient in found.values())


def test_the_chunk_of_the_loss_changes_nothing() -> None:
    delivery = deliver(make_batch((23, 9)))
    sums = []
    for chunk in (1, 4, 1000):
        objective = make_eagle(msgspec.structs.replace(CONFIG, loss_chunk=chunk))
        loss = objective.loss(delivery)
        sums.append((loss.sum.detach(), gradients(objective, loss.sum)))
    for total, found in sums[1:]:
        torch.testing.assert_close(total, sums[0][0])
        for name, gradient in found.items():
            assert float((gradient - sums[0][1][name]).norm() / gradient.norm()) < 1e-5, name


def test_the_vocabulary_is_that_of_the_labels() -> None:
    objective = make_eagle()
    chosen = objective.draft.vocabulary.numpy()
    assert chosen.size == 60
    assert COUNTS[chosen].min() >= np.delete(COUNTS, chosen).max()
    assert objective.facts()["draft vocabulary"] == f"60 of 97, {COUNTS[chosen].sum() / COUNTS.sum():.1%} of labels"


def test_what_cannot_be_taught_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected label counts of the training data"):
        Eagle3(CONFIG, parts()._replace(label_counts=None))
    with pytest.raises(ConfigError, match="target tiny: its lm_head has a bias: a draft cannot learn its distribution"):
        make_eagle(figures={"odd_logits": "its lm_head has a bias"})
    with pytest.raises(ConfigError, match="covers 8% of the labels: expected at least 50%"):
        Eagle3(Eagle3Config(draft_vocab_size=8), parts()._replace(label_counts=np.full(97, 5)))
