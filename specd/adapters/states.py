"""A torch data set of hidden states: the share of one rank in each epoch, from where a run stood."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import IterableDataset, get_worker_info

from specd.client.subscriber import Subscriber
from specd.data.batching import Loader
from specd.errors import ConfigError
from specd.protocol.batch import Delivery

Item = TypeVar("Item")


def packed(delivery: Delivery) -> dict[str, torch.Tensor]:
    """A delivery as tensors of its own: tokens int64 [T], lengths int64 [B], loss_mask bool [T], taps, final."""
    batch = delivery.batch
    states = {"taps": delivery.taps, "final": delivery.final}
    return {
        "tokens": torch.from_numpy(batch.tokens).long(),
        "lengths": torch.from_numpy(batch.lengths).long(),
        "loss_mask": torch.from_numpy(batch.loss_mask).clone(),
        **{name: tensor.clone() for name, tensor in states.items() if tensor is not None},
    }


class States(IterableDataset[Item], Generic[Item]):
    """The batches of a loader with their states, one epoch an iteration, each made an item by `form`.

    The ranks of a training take turns, batch by batch, so all have equally many: what is left of an epoch when not
    every rank would get one more is not trained in it. A state says how far all of them are, and suits any number of
    ranks. It counts what was handed out: take it once the last item is trained.

    A DataLoader around it has batch_size=None, and no workers: the subscriber fetches ahead already.
    """

    def __init__(
        self,
        subscriber: Subscriber,
        loader: Loader,
        form: Callable[[Delivery], Item],
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """form: `packed`, or one of an adapter; what it returns must not refer to the delivery's tensors.

        Raises ConfigError for a rank that is none of them.
        """
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank={rank}, world_size={world_size}: expected a rank from 0 to world_size - 1")
        self._subscriber, self._loader, self._form = subscriber, loader, form
        self._rank, self._world_size = rank, world_size
        self._epoch = self._done = 0
        self._stream: Generator[Delivery, None, None] | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the next item, from 0."""
        return self._epoch

    def __len__(self) -> int:
        """Items of the whole epoch; another one may have a few more, or less."""
        return self._loader.plan.num_batches(self._epoch) // self._world_size

    @property
    def left(self) -> int:
        """Items that are left of the epoch."""
        return self._batches_left() // self._world_size

    def __iter__(self) -> Iterator[Item]:
        """The rest of the epoch; the next iteration gives the one behind it.

        Raises ConfigError in a DataLoader's worker, and for an epoch of fewer batches than ranks; and what
        `Subscriber.stream` raises.
        """
        if get_worker_info() is not None:
            raise ConfigError("a data set of hidden states in a worker of a DataLoader; give it num_workers=0")
        if self._done == 0 and self._batches_left() < self._world_size:
            raise ConfigError(
                f"epoch {self._epoch} has {self._batches_left()} batches for {self._world_size} ranks; expected one "
                f"for each: make batches smaller, or train on more samples"
            )
        self.close()
        return self._items()

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of this epoch, or stay where a run stands in it."""
        if epoch < 0:
            raise ConfigError(f"epoch {epoch}: expected 0 or more")
        if epoch != self._epoch:
            self._epoch, self._done = epoch, 0

    def seek(self, items: int) -> None:
        """Go to where each rank has had so many items of this epoch. Raises ConfigError for more than it has."""
        if not 0 <= items <= len(self):
            raise ConfigError(f"item {items} of epoch {self._epoch}: expected 0 to {len(self)}; is it the same data?")
        self._done = items * self._world_size

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: the same on all ranks once each has had equally many items."""
        plan = self._loader.plan
        return {"epoch": self._epoch, "batch": self._done, "of": plan.num_batches(self._epoch), "plan": repr(plan)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises ConfigError for a state of other data, or of another order."""
        if missing := sorted({"epoch", "batch", "of", "plan"} - state.keys()):
            raise ConfigError(f"the state has no {', '.join(missing)}: expected what `state_dict` gave")
        plan = self._loader.plan
        epoch, done = int(state["epoch"]), int(state["batch"])
        count = plan.num_batches(epoch)
        if (state["of"], state["plan"]) != (count, repr(plan)) or not 0 <= done <= count:
            raise ConfigError(
                f"the state is of {state['plan']} with {state['of']} batches in epoch {epoch}, the data is {plan} "
                f"with {count}; resume with the data, batch size and seed that it was trained with"
            )
        self._epoch, self._done = epoch, done

    def close(self) -> None:
        """Give up what is in flight. The subscriber stays open."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _batches_left(self) -> int:
        return self._loader.plan.num_batches(self._epoch) - self._done

    def _items(self) -> Iterator[Item]:
        epoch, count = self._epoch, self.left
        places = self._loader.places_of(epoch, self._done + self._rank)
        share = islice(places, 0, count * self._world_size, self._world_size)
        stream = self._stream = self._subscriber.stream(self._loader.packed(share))
        for delivery in stream:
            item = self._form(delivery)
            self._done += self._world_size
            yield item
        if (self._epoch, stream) == (epoch, self._stream):
            self._epoch, self._done, self._stream = epoch + 1, 0, None
