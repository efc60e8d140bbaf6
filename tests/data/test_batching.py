"""Plans are exact partitions within their budget, the same on every machine, and resume where they stopped."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from specd.config.settings import Packing
from specd.data.batching import BatchPlan, Loader, _splitmix
from specd.errors import ConfigError
from specd.protocol.batch import Batch


class Numbers:
    """Sample i is its number, repeated; every second token is a label."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def tokens(self, i: int) -> NDArray[np.int32]:
        return np.full(self.lengths[i], i, np.int32)

    def loss_mask(self, i: int) -> NDArray[np.bool_]:
        return np.array([j % 2 == 1 for j in range(self.lengths[i])], np.bool_)


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=300)


@settings(deadline=None)
@given(lengths, st.integers(60, 200), st.integers(0, 5), st.integers(-(2**63), 2**63 - 1), st.integers(0, 9))
def test_each_sample_once_an_epoch_and_each_batch_within_its_budget(
    sizes: list[int], budget: int, most: int, seed: int, epoch: int
) -> None:
    plan = BatchPlan(sizes, budget, most, seed)
    batches = plan.epoch(epoch)
    assert sorted(chain.from_iterable(batches)) == list(range(len(sizes)))
    assert all(batches)
    assert all(sum(sizes[i] for i in batch) <= budget for batch in batches)
    assert all(len(batch) <= most for batch in batches if most)
    assert BatchPlan(sizes, budget, most, seed).epoch(epoch) == batches


@settings(deadline=None)
@given(lengths, st.data(), st.integers(0, 2**63 - 1))
def test_weights_are_kept_to_over_the_epochs_and_nearly_in_each(
    sizes: list[int], data: st.DataObject, seed: int
) -> None:
    weight = st.floats(0.01, 3.5)
    weights = data.draw(st.lists(weight, min_size=len(sizes), max_size=len(sizes)))
    plan = BatchPlan(sizes, 100, seed=seed, weights=weights)
    counts = np.zeros(len(sizes), np.int64)
    for epoch in range(8):
        batches = plan.epoch(epoch)
        found = np.bincount([i for batch in batches for i in batch], minlength=len(sizes))
        assert all(np.floor(weights) <= found)
        assert all(found <= np.ceil(weights))
        assert all(sum(sizes[i] for i in batch) <= 100 for batch in batches)
        counts += found
        assert all(abs(counts - np.array(weights) * (epoch + 1)) < 1 + 1e-6)
    assert BatchPlan(sizes, 100, seed=seed, weights=weights).epoch(5) == plan.epoch(5)


def test_half_of_the_samples_come_in_one_epoch_and_the_other_half_in_the_next() -> None:
    plan = BatchPlan([4] * 1000, 40, seed=3, weights=[0.5] * 1000)
    first, second, third = (set(chain.from_iterable(plan.epoch(epoch))) for epoch in range(3))
    assert first | second == set(range(1000))
    assert not first & second
    assert first == third
    assert 450 < len(first) < 550


def test_a_weight_of_one_is_no_weight() -> None:
    sizes = [4, 2, 3, 1, 5, 2] * 9
    plain, weighted = BatchPlan(sizes, 12, seed=3), BatchPlan(sizes, 12, seed=3, weights=[1.0] * len(sizes))
    assert [plain.epoch(epoch) for epoch in range(3)] == [weighted.epoch(epoch) for epoch in range(3)]


def test_weights_that_leave_no_sample_in_any_epoch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^no sample is trained in 2 epochs with these data\.weights; expected"):
        Loader(Numbers([4]), BatchPlan([4], 12, weights=[0.001]), epochs=2)


def test_resuming_in_an_epoch_without_any_sample() -> None:
    plan = BatchPlan([4], 12, weights=[0.3])
    loader = Loader(Numbers([4]), plan, epochs=10)
    found = list(loader)
    assert len(found) == loader.num_batches == 3
    assert [batch.epoch for batch in loader.remaining(found[0].epoch, 1)] == [batch.epoch for batch in found[1:]]


@settings(deadline=None)
@given(lengths, st.integers(0, 2**63 - 1), st.data())
def test_fixed_packs_are_those_of_the_first_epoch_in_every_epoch(
    sizes: list[int], seed: int, data: st.DataObject
) -> None:
    weights = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=len(sizes), max_size=len(sizes)))
    plan = BatchPlan(sizes, 100, seed=seed, weights=weights, packing="fixed")
    anew = BatchPlan(sizes, 100, seed=seed, weights=weights)
    assert plan.epoch(0) == anew.epoch(0)
    for epoch in (3, 1, 2):
        assert sorted(plan.epoch(epoch)) == sorted(anew.epoch(0))
        assert plan.num_batches(epoch) == anew.num_batches(0)


def test_fixed_packs_come_in_another_order_each_epoch() -> None:
    plan = BatchPlan([5] * 100, 20, seed=4, packing="fixed")
    epochs = [plan.epoch(epoch) for epoch in range(4)]
    assert all(a != b for i, a in enumerate(epochs) for b in epochs[:i])
    assert BatchPlan([4, 2, 3, 1, 5, 2], 6, seed=3, packing="fixed").epoch(1) == [(4,), (2,), (0,), (3, 5, 1)]


def test_fixed_packs_cannot_have_a_sample_in_some_epochs_only() -> None:
    said = r"^data\.packing=fixed with data\.weights of 1\.5: every .*; expected whole numbers, or data\.packing=anew$"
    with pytest.raises(ConfigError, match=said):
        BatchPlan([4, 4], 12, weights=[1, 1.5], packing="fixed")


@settings(deadline=None)
@given(lengths, st.integers(1, 3), st.sampled_from(["anew", "fixed"]), st.data())
def test_resuming_anywhere_gives_the_tail(sizes: list[int], epochs: int, packing: Packing, data: st.DataObject) -> None:
    plan = BatchPlan(sizes, 100, seed=7, packing=packing)
    whole = list(Loader(Numbers(sizes), plan, epochs=epochs))
    assert len(whole) == Loader(Numbers(sizes), plan, epochs=epochs).num_batches
    trained = data.draw(st.integers(0, len(whole)))
    epoch, index = (whole[trained - 1].epoch, whole[trained - 1].index + 1) if trained else (0, 0)
    resumed = Loader(Numbers(sizes), BatchPlan(sizes, 100, seed=7, packing=packing), epochs=epochs).remaining(
        epoch, index
    )
    assert [facts(batch) for batch in resumed] == [facts(batch) for batch in whole[trained:]]


def test_an_epochs_batches_are_that_epochs() -> None:
    loader = Loader(Numbers([4] * 20), BatchPlan([4] * 20, 12), epochs=3)
    assert {batch.epoch for batch in loader.batches(1)} == {1}
    by_epoch = [list(loader.batches(epoch)) for epoch in range(3)]
    assert [facts(batch) for epoch in by_epoch for batch in epoch] == [facts(batch) for batch in loader]
    assert [batch.index for batch in loader.batches(2, 5)] == list(range(5, len(by_epoch[2])))
    assert list(loader.batches(0, len(by_epoch[0]))) == []


def facts(batch: Batch) -> tuple[object, ...]:
    arrays = (batch.tokens, batch.lengths, batch.loss_mask)
    return batch.epoch, batch.index, batch.samples, *((array.dtype.name, array.tolist()) for array in arrays)


def test_a_batch_is_its_samples_end_to_end() -> None:
    sizes = [3, 2, 4]
    (batch,) = Loader(Numbers(sizes), BatchPlan(sizes, 100))
    assert batch.tokens.tolist() == list(chain.from_iterable([i] * sizes[i] for i in batch.samples))
    assert batch.lengths.tolist() == [sizes[i] for i in batch.samples]
    assert batch.loss_mask.tolist() == list(
        chain.from_iterable([j % 2 == 1 for j in range(sizes[i])] for i in batch.samples)
    )
    assert [batch.tokens.dtype.name, batch.lengths.dtype.name, batch.loss_mask.dtype.name] == ["int32", "int32", "bool"]


def test_epochs_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    build = BatchPlan._build

    def spy(self: BatchPlan, epoch: int) -> list[tuple[int, ...]]:
        built.append(epoch)
        return build(self, epoch)

    monkeypatch.setattr(BatchPlan, "_build", spy)
    sizes = [3, 5, 2] * 40
    loader = Loader(Numbers(sizes), BatchPlan(sizes, 16, seed=1), epochs=4)
    assert loader.num_batches == len(loader) == loader.num_batches
    assert built == [0, 1, 2, 3]
    assert len(list(loader)) == loader.num_batches
    assert built == [0, 1, 2, 3] * 2, "counts are kept, batches of one epoch only"


def test_seeds_and_epochs_differ() -> None:
    sizes = [5] * 100
    epochs = [BatchPlan(sizes, 20, seed=seed).epoch(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(epochs) for b in epochs[:i])


def test_the_order_is_the_same_on_every_machine() -> None:
    """Written down once: a resumed run on another machine or numpy must see this very epoch."""
    assert BatchPlan([4, 2, 3, 1, 5, 2], 6, seed=3).epoch(1) == [(4,), (2,), (0,), (3, 1, 5)]


def test_splitmix_gives_its_published_first_number() -> None:
    assert int(_splitmix(np.zeros(1, np.uint64))[0]) == 0xE220A8397B1DCDAF


def test_samples_of_similar_length_share_a_batch() -> None:
    sizes = [10, 90] * 50
    mixed = [batch for batch in BatchPlan(sizes, 180).epoch(0) if {sizes[i] for i in batch} == {10, 90}]
    assert len(mixed) <= 1


@pytest.mark.parametrize(
    ("sizes", "budget", "most", "said"),
    [
        ([3, 9, 4], 8, 0, r"sample 1 has 9 tokens, more than data\.batch_tokens=8; raise it, or .*data\.max_length=8"),
        ([3], 0, 0, r"data\.batch_tokens=0"),
        ([3], 8, -1, r"data\.max_batch_sequences=-1"),
        ([], 8, 0, r"no samples"),
    ],
)
def test_what_cannot_be_planned_is_refused_at_once(sizes: list[int], budget: int, most: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        BatchPlan(sizes, budget, most)


def test_a_loader_has_at_least_one_epoch() -> None:
    plan = BatchPlan([3], 8)
    with pytest.raises(ConfigError, match="expected at least 1"):
        Loader(Numbers([3]), plan, epochs=0)
    assert list(Loader(Numbers([3]), plan, epochs=2).remaining(2, 0)) == []
