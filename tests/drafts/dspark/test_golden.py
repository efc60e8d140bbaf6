"""Loss and gradients are those that SpecForge had for the same weights, states and anchors."""

from __future__ import annotations

import pytest

from golden_drafts import DSPARK_CASES, differences, figures, golden_dspark, read_golden


@pytest.mark.parametrize("case", DSPARK_CASES)
def test_what_specforge_trains(case: str) -> None:
    objective, delivery = golden_dspark(DSPARK_CASES[case])
    loss = objective.loss(delivery)
    loss.sum.backward()  # type: ignore[no-untyped-call]
    gradients = {key: weight.grad for key, weight in objective.module.named_parameters() if weight.grad is not None}
    found = figures(float(loss.sum.detach()), [int(loss.metrics["counted"].sum())], gradients)
    apart = differences(found, read_golden()[f"dspark: {case}"])
    assert max(apart.values()) < 1e-5, apart
