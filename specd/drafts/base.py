"""What a draft brings to training and to decoding: the contracts of the family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import TargetContract

if TYPE_CHECKING:
    from specd.protocol.batch import Delivery


class Loss(NamedTuple):
    """Sums over one batch, all on the trainer's device; whoever takes the optimizer step divides by the total weight.

    sum: weighted sum over predictions, 0-d float32 with a graph to every parameter. weight: sum of their weights, 0-d
    float32. metrics: `counted` and `correct`, float32 [K]: predictions at offsets 1…K under teacher forcing, and how
    many of them were right. A batch without a prediction has sum 0 and weight 0.
    """

    sum: Tensor
    weight: Tensor
    metrics: Mapping[str, Tensor]


class Objective(Protocol):
    """A draft, how it is trained, and how it is exported."""

    @property
    def module(self) -> torch.nn.Module:
        """The draft; its trainable parameters are the float32 masters."""
        ...

    def spec_for(self, contract: TargetContract) -> CaptureSpec:
        """What this draft needs captured from that target."""
        ...

    def loss(self, delivery: Delivery) -> Loss:
        """The loss of one delivered batch; random choices depend on seed, epoch and sample only."""
        ...

    def export(self, path: Path) -> None:
        """Write the draft to a directory in its published format."""
        ...


class Drafter(Protocol):
    """Something that guesses how a text goes on. It follows one text at a time."""

    @property
    def taps(self) -> tuple[int, ...]:
        """The 0-based target layers whose states it wants."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens of a block, the last known one included; it guesses block_size − 1."""
        ...

    def reset(self) -> None:
        """Forget the text: another one begins."""
        ...

    def extend(self, taps: Tensor) -> None:
        """The target's states [tokens, n·H] of the next tokens of the text, each token once and in order."""
        ...

    def propose(self, token: int) -> Tensor:
        """Guesses int64 [block_size − 1] for what follows `token`, the text's last, whose states are not known yet."""
        ...
