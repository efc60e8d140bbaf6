"""The network of block drafts: its first weights."""

from __future__ import annotations

import pytest
import torch

from drafts import (
    make_draft,
)


def test_initial_weights_follow_the_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    one, same, other = make_draft(seed=1), make_draft(seed=1), make_draft(seed=2)
    assert torch.equal(torch.rand(1), expected)
    weights = [draft.draft.fc.weight for draft in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].std().item() == pytest.approx(0.02, rel=0.1)
    assert not [name for name in one.module.state_dict() if "embed" in name or "head" in name]
