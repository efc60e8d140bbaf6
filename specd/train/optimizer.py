"""Optimizer steps: their number, their learning rate, and one step over gradients of loss sums."""

from __future__ import annotations

import math
from itertools import chain

import torch
from torch.optim.adamw import adamw

from specd.config.settings import TrainConfig


def total_steps(config: TrainConfig, num_batches: int, step: int = 0, trained: int = 0) -> int:
    """Optimizer steps of a run over `num_batches` batches: at most max_steps, if that is set.

    step, trained: steps done and batches they took, of which the last may have been fewer if the run was to end there.
    """
    steps = step + math.ceil((num_batches - trained) / config.accumulation)
    return min(steps, config.max_steps) if config.max_steps else steps


def learning_rate(config: TrainConfig, step: float, steps: int) -> float:
    """Rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then a cosine that reaches 0 at the end.

    step: between two where a limit of time is what drives it.
    """
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.lr * min(1.0, (step + 1) / warmup)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(module: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on matrices only, norms keep their scale."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], config.lr, config.betas, fused=True)
    for parameter in trainable:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


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
        scale = divisor * (torch.clamp((norm + 1e-6) / clip, min=1.0) if clip else 1.0)
        _update(optimizer, scale.float(), torch.maximum(halted, (weight <= 0).float()))
    optimizer.zero_grad(set_to_none=True)
    return norm, halted


def _update(optimizer: torch.optim.AdamW, scale: torch.Tensor, skipped: torch.Tensor) -> None:
    """AdamW with gradients divided by `scale`, or nothing where `skipped` is 1: the decision never leaves the device.

    Both are 0-d float32.
    """
    for group in optimizer.param_groups:
        trained = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not trained:
            continue
        states = [optimizer.state[parameter] for parameter in trained]
        beta1, beta2 = group["betas"]
        with torch.no_grad():
            adamw(
                trained,
                [parameter.grad for parameter in trained if parameter.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                max_exp_avg_sqs=[],
                state_steps=[state["step"] for state in states],
                fused=True,
                grad_scale=scale,
                found_inf=skipped,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
