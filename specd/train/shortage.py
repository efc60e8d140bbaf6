"""What is said of a run that the memory of its device does not hold."""

from __future__ import annotations

import torch

from specd.errors import SpecdError
from specd.protocol.batch import Batch


def out_of_memory(what: str, error: torch.OutOfMemoryError, remedy: str) -> SpecdError:
    """The error of a run that needs more memory than there is. what: it is missing for. remedy: for the same run."""
    return SpecdError(
        f"{what}: {error}; {remedy}, or start a new run with a limit in data.max_batch_sequences, a smaller "
        f"data.batch_tokens or a smaller draft"
    )


def no_memory_for(step: int, batch: Batch | None) -> str:
    """What is missing for a step. batch: that it ran out at, None if it was behind the last one."""
    if batch is None:
        return f"step {step}: no memory left"
    return (
        f"step {step}: no memory left for batch {batch.index} of epoch {batch.epoch} ({batch.lengths.size} sequences, "
        f"{batch.num_tokens} tokens, {int(batch.loss_mask.sum())} of them labels)"
    )
