"""Loss and gradients are those that SpecForge and Speculators had for the same weights and states."""

from __future__ import annotations

import pytest

from golden_drafts import EAGLE_CASES, differences, figures, golden_eagle, read_golden


@pytest.mark.parametrize("name", EAGLE_CASES)
def test_what_others_train(name: str) -> None:
    objective, delivery = golden_eagle(EAGLE_CASES[name])
    loss = objective.loss(delivery)
    loss.sum.backward()  # type: ignore[no-untyped-call]
    gradients = {key: weight.grad for key, weight in objective.module.named_parameters() if weight.grad is not None}
    found = figures(float(loss.sum.detach()), loss.metrics["counted"].int().tolist(), gradients)
    apart = differences(found, read_golden()[f"eagle3: {name}"])
    assert max(apart.values()) < 1e-5, apart
