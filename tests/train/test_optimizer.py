"""One optimizer step on the device: the bits of torch's own fused AdamW, and none where there is nothing to learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specd.config.settings import TrainConfig
from specd.train.optimizer import apply_gradients, make_optimizer

CONFIG = TrainConfig(lr=0.02, weight_decay=0.1)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.LayerNorm(40), torch.nn.Linear(40, 3))


def tensors(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [optimizer.state[part] for part in module.parameters()]
    return [*(part.detach() for part in module.parameters()), *(value for state in moments for value in state.values())]


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_it_is_adamw_with_gradients_divided_and_clipped(clip: float) -> None:
    """To the bit what torch's optimizer makes of a gradient scale, as its GradScaler sets it."""
    mine, theirs = network(), network()
    optimizer = make_optimizer(mine, CONFIG)
    reference = make_optimizer(theirs, CONFIG)
    halted = torch.zeros(())
    for step in range(12):
        inputs = torch.randn(9, 30, generator=torch.Generator().manual_seed(step))
        for module in (mine, theirs):
            (module(inputs) ** 2).sum().backward()
        parts = [part for group in reference.param_groups for part in group["params"]]
        norm = torch.nn.utils.get_total_norm([part.grad for part in parts]) / 9
        scaled: Any = reference
        scaled.grad_scale = torch.tensor(9.0) * (torch.clamp((norm + 1e-6) / clip, min=1.0) if clip else 1.0)
        scaled.found_inf = torch.zeros(())
        reference.step()
        reference.zero_grad(set_to_none=True)
        found, halted = apply_gradients(optimizer, torch.tensor(9.0), torch.ones(1), clip, halted)
        assert torch.equal(found, norm)
    assert float(halted) == 0
    for one, other in zip(tensors(mine, optimizer), tensors(theirs, reference), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("what", ["no weight", "a loss", "a gradient", "an earlier step"])
def test_a_step_that_must_not_be_changes_nothing(what: str) -> None:
    module = network()
    optimizer = make_optimizer(module, CONFIG)
    module(torch.ones(1, 30)).sum().backward()
    _, halted = apply_gradients(optimizer, torch.tensor(1.0), torch.ones(1), 1.0, torch.zeros(()))
    before = [tensor.clone() for tensor in tensors(module, optimizer)]
    module(torch.ones(1, 30)).sum().backward()
    if what == "a gradient":
        next(part.grad for part in module.parameters() if part.grad is not None).fill_(float("inf"))
    _, halted = apply_gradients(
        optimizer,
        torch.tensor(0.0 if what == "no weight" else 1.0),
        torch.tensor([1.0, float("nan") if what == "a loss" else 1.0]),
        1.0,
        torch.ones(()) if what == "an earlier step" else halted,
    )
    assert all(torch.equal(one, other) for one, other in zip(tensors(module, optimizer), before, strict=True))
    assert float(halted) == (what != "no weight")
    assert all(part.grad is None for part in module.parameters())


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    module = network()
    optimizer = make_optimizer(module, CONFIG)
    before = [part.detach().clone() for part in module.parameters()]
    (module[2].weight.sum()).backward()  # type: ignore[index]
    apply_gradients(optimizer, torch.tensor(1.0), torch.ones(1), 0.0, torch.zeros(()))
    changed = [not torch.equal(part, old) for part, old in zip(module.parameters(), before, strict=True)]
    assert changed == [False] * 4 + [True, False]
