"""Optimizer steps: their number, their learning rate, and one step over gradients of loss sums."""

from __future__ import annotations

import math
from itertools import chain

import torch

from specd.config.settings import TrainConfig


def total_steps(config: TrainConfig, num_batches: int, step: int = 0, trained: int = 0) -> int:
    """Optimizer steps of a run over `num_batches` batches: at most max_steps, if that is set.

    step, trained: steps done and batches they took, of which the last may have been fewer if the run was to end there.
    """
    steps = step + math.ceil((num_batches - trained) / config.accumulation)
    return min(steps, config.max_steps) if config.max_steps else steps


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then a cosine that reaches 0 at the end."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(module: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on matrices only, norms keep their scale."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], config.lr, config.betas, fused=True)


def apply_gradients(
    optimizer: torch.optim.AdamW, weight: torch.Tensor, losses: torch.Tensor, clip: float, halted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step with the accumulated gradients of loss sums, which it clears. No host sync.

    weight: 0-d float32, divides the gradients. losses: [batches]. clip: of the gradients' norm, 0 for none.
    halted: 0-d float32, 1 disables every step from now on. A step without weight, with a non-finite loss or gradient,
    or after such a one, leaves weights and moments unchanged. Returns the norm before clipping, and `halted`.
    """
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    divisor = torch.where(weight > 0, weight, 1.0)
    norm = torch.nn.utils.get_total_norm(gradients).to(divisor.device) / divisor
    finite = torch.isfinite(norm) & torch.isfinite(losses).all()
    halted = torch.maximum(halted, (~finite).float())
    if gradients:
        # What GradScaler sets on a fused optimizer (torch 2.9 to 2.13, AdamW.step): gradients are divided by
        # grad_scale, and nothing changes where found_inf is 1. This way the decision never leaves the device.
        optimizer.grad_scale = divisor * (torch.clamp((norm + 1e-6) / clip, min=1.0) if clip else 1.0)  # type: ignore[attr-defined]
        optimizer.found_inf = torch.maximum(halted, (weight <= 0).float())  # type: ignore[attr-defined]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, halted
