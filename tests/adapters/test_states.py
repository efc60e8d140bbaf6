"""A rank's share of each epoch: which batches it has, in which order, and that it goes on where it stood."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from specd.adapters.states import States, packed
from specd.client.subscriber import Subscriber
from specd.daemon.serve import Embedded
from specd.errors import ConfigError
from specd.protocol.batch import Delivery
from streams import HIDDEN, hosted, loader, subscriber


@pytest.fixture(scope="module")
def host() -> Iterator[Embedded]:
    with hosted() as host:
        yield host


@pytest.fixture(scope="module")
def source(host: Embedded) -> Iterator[Subscriber]:
    with subscriber(host) as source:
        yield source


def place(delivery: Delivery) -> tuple[int, int]:
    return delivery.batch.epoch, delivery.batch.index


def states(source: Subscriber, rank: int = 0, world_size: int = 1) -> States[tuple[int, int]]:
    return States(source, loader(), place, rank=rank, world_size=world_size)


def test_ranks_take_turns_and_have_equally_many(source: Subscriber) -> None:
    count = loader().plan.num_batches(0)
    assert count % 3 != 0
    shares = []
    for rank in range(3):
        share = states(source, rank, 3)
        assert len(share) == share.left == count // 3
        shares.append(list(share))
        assert share.state_dict() | {"plan": ""} == {
            "epoch": 1, "batch": 0, "of": loader().plan.num_batches(1), "plan": ""
        }  # fmt: skip
    assert list(itertools.chain(*zip(*shares, strict=True))) == [(0, index) for index in range(count // 3 * 3)]


def test_each_iteration_is_an_epoch_and_set_epoch_says_which(source: Subscriber) -> None:
    data = states(source)
    epochs = [list(data), list(data)]
    data.set_epoch(5)
    epochs.append(list(data))
    assert [{epoch for epoch, _ in one} for one in epochs] == [{0}, {1}, {5}]
    assert all([index for _, index in one] == list(range(len(one))) for one in epochs)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_run_goes_on_where_it_stood_with_any_number_of_ranks(source: Subscriber, ranks: int) -> None:
    count = loader().plan.num_batches(1)
    first = states(source, 1, 2)
    first.set_epoch(1)
    assert list(itertools.islice(first, 2)) == [(1, 1), (1, 3)]
    first.close()
    rest = []
    for rank in range(ranks):
        again = states(source, rank, ranks)
        again.load_state_dict(first.state_dict())
        again.set_epoch(1)  # as a loop does: it stays where it stands
        assert (len(again), again.left) == (count // ranks, (count - 4) // ranks)
        rest.append(list(again))
    assert sorted(itertools.chain(*rest)) == [(1, index) for index in range(4, 4 + (count - 4) // ranks * ranks)]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11 with torch 2.13
@pytest.mark.parametrize("stop", [0, 3])
def test_torchdatas_loader_keeps_its_place(source: Subscriber, stop: int) -> None:
    def batches() -> Any:
        return StatefulDataLoader(states(source), batch_size=None)

    whole, begun, again = list(batches()), batches(), batches()
    seen = list(itertools.islice(begun, stop))
    again.load_state_dict(begun.state_dict())
    begun.dataset.close()
    assert seen + list(again) == whole
    assert {epoch for epoch, _ in again} == {1}


def test_items_outlive_their_delivery(source: Subscriber) -> None:
    """Through torch's own loader; the buffers of the subscriber are filled anew many times."""
    items = list(DataLoader(States(source, loader(), packed), batch_size=None))
    batches = loader().batches(0)
    assert len(items) > 4
    for item, delivery in zip(items, source.stream(batches), strict=True):
        assert delivery.taps is not None
        assert item["taps"].shape == (delivery.batch.num_tokens, 2, HIDDEN)
        assert torch.equal(item["taps"], delivery.taps)
        assert torch.equal(item["tokens"], torch.from_numpy(delivery.batch.tokens).long())


def test_leaving_an_epoch_early_lets_the_next_one_begin(source: Subscriber) -> None:
    data = states(source)
    assert next(iter(data)) == (0, 0)
    data.set_epoch(1)
    assert next(iter(data)) == (1, 0)
    data.seek(4)
    assert next(iter(data)) == (1, 4)


def test_what_cannot_be_is_refused(source: Subscriber) -> None:
    data, count = states(source), loader().plan.num_batches(0)
    with pytest.raises(ConfigError, match=r"rank=2, world_size=2: expected a rank from 0"):
        states(source, 2, 2)
    with pytest.raises(ConfigError, match=f"epoch 0 has {count} batches for 90 ranks"):
        iter(states(source, 0, 90))
    with pytest.raises(ConfigError, match=f"item {count + 1} of epoch 0: expected 0 to {count}"):
        data.seek(count + 1)
    with pytest.raises(ConfigError, match="epoch -1: expected 0 or more"):
        data.set_epoch(-1)
    other = States(source, loader(batch_tokens=48), place)
    with pytest.raises(ConfigError, match=r"32 tokens a batch.* the data is .*48 tokens a batch"):
        other.load_state_dict(data.state_dict())
    with pytest.raises(ConfigError, match="the state has no batch, of, plan"):
        other.load_state_dict({"epoch": 1})


def test_a_worker_of_a_data_loader_is_refused(source: Subscriber, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specd.adapters.states.get_worker_info", object)
    with pytest.raises(ConfigError, match="num_workers=0"):
        iter(states(source))
