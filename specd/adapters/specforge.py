"""SpecForge's training loop on the states of a daemon: its TrainBatch, as its loader of features makes it.

Shape legend: B sequences, L the longest one, N taps, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from specd.adapters.sequences import ascending, final_of, side_by_side, taps_of, tokens_of
from specd.adapters.states import States
from specd.client.subscriber import Subscriber
from specd.data.batching import Loader
from specd.errors import ConfigError
from specd.protocol.batch import Delivery
from specd.protocol.capture import CaptureSpec, StateDtype

if TYPE_CHECKING:
    from torch import Tensor

STATES: Final = {
    "dflash": ("hidden_states", None),
    "domino": ("hidden_states", None),
    "dspark": ("hidden_states", "target_last_hidden_states"),
    "eagle3": ("hidden_state", "target"),
    "peagle": ("hidden_state", "target"),
}
"""Its algorithms, and what they call taps and the last state."""


def capture(algorithm: str, layer_ids: Sequence[int], dtype: StateDtype = "bfloat16") -> CaptureSpec:
    """What a draft reads: its target_layer_ids, or eagle_aux_hidden_state_layer_ids, are numbers of taps.

    Raises ConfigError for ids that are no taps, or an algorithm whose batches are not known.
    """
    ascending(layer_ids, 0, "taps are numbers of layers, from 0")
    return CaptureSpec(taps=tuple(layer_ids), final=_names(algorithm)[1] is not None, dtype=dtype)


class Form:
    """A delivery as SpecForge's TrainBatch: sequences side by side, zeros behind shorter ones."""

    def __init__(self, algorithm: str, *, ttt_length: int | None = None) -> None:
        """ttt_length: goes into the batch's metadata. Raises ConfigError for an algorithm that is not known, or
        without SpecForge."""
        try:
            from specforge.runtime.contracts import TrainBatch
        except ImportError as error:
            raise ConfigError(
                f"SpecForge cannot be imported: {error}; where it is not installed: pip install specforge"
            ) from error
        self._algorithm, self._batch = algorithm, TrainBatch
        self._taps, self._final = _names(algorithm)
        shifts = self._final == "target"  # what EAGLE's strategies do themselves, to states as they are stored
        self._metadata = {"target_repr": "hidden_state" if shifts else None, "ttt_length": ttt_length}

    def __call__(self, delivery: Delivery) -> Any:
        """A TrainBatch with tensors [B, L, …] on the delivery's device. Raises ConfigError for P-EAGLE with B > 1."""
        taps, batch = taps_of(delivery), delivery.batch
        if self._algorithm == "peagle" and batch.lengths.size > 1:
            raise ConfigError(
                f"a batch of {batch.lengths.size} sequences for SpecForge's P-EAGLE, which takes one at a time; "
                f"plan batches with max_batch_sequences=1"
            )
        ids, labels, lengths = tokens_of(delivery, taps.device)
        columns = {"input_ids": ids, "loss_mask": labels, self._taps: taps}
        if self._final is not None:
            columns[self._final] = final_of(delivery)
        if self._final == "target":
            labels[lengths.cumsum(0) - 1] = 0  # nothing of the target follows a sequence's last token
            columns["attention_mask"] = labels.new_ones(labels.shape)
        tensors: dict[str, Tensor] = {name: side_by_side(column, lengths) for name, column in columns.items()}
        return self._batch(
            sample_ids=[str(sample) for sample in batch.samples],
            strategy=self._algorithm,
            tensors=tensors,
            metadata=dict(self._metadata),
        )


def state_loader(
    subscriber: Subscriber,
    loader: Loader,
    algorithm: str,
    *,
    ttt_length: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> States[Any]:
    """In place of the FeatureDataLoader that `TrainerController.fit` draws from: its set_epoch, seek and close.

    Raises ConfigError as `Form` does, or for a rank that is none.
    """
    return States(subscriber, loader, Form(algorithm, ttt_length=ttt_length), rank=rank, world_size=world_size)


def _names(algorithm: str) -> tuple[str, str | None]:
    if algorithm not in STATES:
        raise ConfigError(f"algorithm {algorithm!r} of SpecForge: expected one of {', '.join(STATES)}")
    return STATES[algorithm]
