"""Speculators' training loop on the states of a daemon: batches as its own loader makes them.

Shape legend: T tokens of a batch, S its total_seq_len, N taps, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from specd.adapters.sequences import ascending, final_of, numbers, positions, taps_of, tokens_of
from specd.adapters.states import States
from specd.client.subscriber import Subscriber
from specd.data.batching import Loader
from specd.errors import ConfigError
from specd.protocol.batch import Delivery
from specd.protocol.capture import CaptureSpec, StateDtype

SHIFTED: Final = {"dflash": False, "dflash2": False, "dspark": False, "xpress": False, "eagle3": True, "peagle": True}
"""Its algorithms, and whether a row pairs the states of one token with the next one."""


def capture(layer_ids: Sequence[int], dtype: StateDtype = "bfloat16") -> CaptureSpec:
    """What a draft reads whose target_layer_ids these are: they count the embedding as 0, taps do not.

    Raises ConfigError for ids that are no taps.
    """
    ascending(layer_ids, 1, "a daemon captures what a layer gives, not the embedding")
    return CaptureSpec(taps=tuple(layer - 1 for layer in layer_ids), final=True, dtype=dtype)


def take_normed(model: nn.Module) -> None:
    """Let a draft take last states as a daemon gives them, behind the target's final norm, which it would apply itself.

    Call it once its weights are there and before it is wrapped. Raises ConfigError for a model without such a norm.
    """
    if not isinstance(getattr(model, "verifier_norm", None), nn.Module):
        raise ConfigError(f"{type(model).__name__} has no verifier_norm; expected a draft that learns from last states")
    model.verifier_norm = nn.Identity()


class Form:
    """A delivery as Speculators' CollateFn has it: all sequences in one row of S tokens, zeros behind them."""

    def __init__(self, algorithm: str, total_seq_len: int) -> None:
        """Raises ConfigError for an algorithm whose batches are not known."""
        if algorithm not in SHIFTED:
            raise ConfigError(f"algorithm {algorithm!r} of Speculators: expected one of {', '.join(SHIFTED)}")
        self._shifted, self._size = SHIFTED[algorithm], total_seq_len

    def __call__(self, delivery: Delivery) -> dict[str, Any]:
        """Tensors [1, S, …] on the delivery's device. Raises ConfigError for a batch of more than S tokens."""
        taps, final = taps_of(delivery), final_of(delivery)
        ids, labels, lengths = tokens_of(delivery, taps.device)
        if ids.numel() > self._size:
            raise ConfigError(
                f"a batch of {ids.numel()} tokens for total_seq_len={self._size}; plan batches of at most that many"
            )
        place, document = positions(lengths), numbers(lengths)
        read = own = torch.arange(ids.numel(), device=ids.device)
        if self._shifted:
            own = own[place > 0]
            read = own - 1
        return {
            "hidden_states": self._row(taps, read),
            "input_ids": self._row(ids, own),
            "verifier_last_hidden_states": self._row(final, own),
            "loss_mask": self._row(labels, own),
            "position_ids": self._row(place, own),
            "document_ids": self._row(document, own, -1),
            "error_records": 0,
        }

    def _row(self, column: Tensor, kept: Tensor, behind: int = 0) -> Tensor:
        row = column.new_full((1, self._size, *column.shape[1:]), behind)
        row[0, : kept.numel()] = column[kept]
        return row


class _Sampler:
    """What Speculators' trainer asks of a loader's batch sampler: the epoch, and a way past what was trained."""

    def __init__(self, states: States[dict[str, Any]]) -> None:
        self._states = states
        self._cached_generated_batches = (-1, range(0))

    def set_epoch(self, epoch: int) -> None:
        self._states.set_epoch(epoch)

    def _generate_batches(self, epoch: int) -> range:
        """Numbers of this rank's batches of an epoch; the trainer cuts them and writes them back."""
        self._states.set_epoch(epoch)
        self._states.seek(0)
        return range(self._states.left)

    def take(self) -> None:
        """Go where the trainer said, if it did since the last time."""
        epoch, left = self._cached_generated_batches
        self._cached_generated_batches = (-1, range(0))
        if epoch == self._states.epoch:
            self._states.seek(left.start)


class StateLoader:
    """In place of the DataLoader that Speculators' Trainer takes: it is told the epoch, and can begin within one."""

    def __init__(
        self,
        subscriber: Subscriber,
        loader: Loader,
        algorithm: str,
        total_seq_len: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Raises ConfigError for an algorithm that is not known, or a rank that is none."""
        form = Form(algorithm, total_seq_len)
        self.states: States[dict[str, Any]] = States(subscriber, loader, form, rank=rank, world_size=world_size)
        self.batch_sampler = _Sampler(self.states)

    def __len__(self) -> int:
        """Batches that are left of the epoch."""
        self.batch_sampler.take()
        return self.states.left

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rest of the epoch. Raises what `States` raises."""
        self.batch_sampler.take()
        return iter(self.states)
