"""The order of training: which samples share a batch, which batch comes when, and where a run stands in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from specd.config.settings import Packing
from specd.errors import ConfigError
from specd.protocol.batch import Batch

GROUP_BATCHES = 64
"""Shuffled samples are sorted by length in groups of this many batches."""


class Samples(Protocol):
    """Tokenised samples by number; a Dataset is one."""

    def tokens(self, i: int) -> NDArray[np.int32]: ...

    def loss_mask(self, i: int) -> NDArray[np.bool_]: ...


class Payloads(Protocol):
    """What makes the payloads of samples."""

    def beside(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with what their samples bring."""
        ...


def check_budget(batch_tokens: int, max_batch_sequences: int) -> None:
    """Raise ConfigError for a budget of batches that nothing can meet."""
    if batch_tokens < 1 or max_batch_sequences < 0:
        raise ConfigError(
            f"data.batch_tokens={batch_tokens}, data.max_batch_sequences={max_batch_sequences}: expected a budget "
            f"of at least one token, and a limit of sequences or 0 for none"
        )


def check_packing(packing: Packing, weights: Iterable[float]) -> None:
    """Raise ConfigError for weights with which epochs have different samples, where all have the same batches."""
    broken = [weight for weight in weights if weight % 1]
    if packing == "fixed" and broken:
        raise ConfigError(
            f"data.packing=fixed with data.weights of {broken[0]:g}: every epoch has the same batches, so it cannot "
            f"train a sample in some epochs and not in others; expected whole numbers, or data.packing=anew"
        )


class BatchPlan:
    """Every epoch as batches of sample numbers: each sample exactly once an epoch, each batch within its budget.

    With weights, sample i comes floor(weights[i]) times in each epoch, and once more in the share of epochs that is
    left: 1.5 is once and twice in turn, 0.5 every second epoch. Half of the samples begin with the one, half with the
    other, so that an epoch has as many samples as the weights say.

    A pure function of its arguments, the same on every machine and with every numpy. Samples of similar length share a
    batch: sorted within groups of GROUP_BATCHES batches of shuffled samples; then the batches are shuffled. With
    `fixed` packing every epoch has the batches of epoch 0, in another order: their states can be kept.
    """

    __slots__ = (
        "_counts", "_epochs", "_lengths", "_packs", "_weights", "batch_tokens", "max_batch_sequences", "packing",
        "seed",
    )  # fmt: skip

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.int64],
        batch_tokens: int,
        max_batch_sequences: int = 0,
        seed: int = 0,
        weights: Sequence[float] | NDArray[np.float64] | None = None,
        packing: Packing = "anew",
    ) -> None:
        """lengths: tokens of each sample. max_batch_sequences: 0 for no limit. weights: of each sample, None for 1.

        Raises ConfigError for a budget that a sample exceeds, and for weights that `fixed` packing cannot keep to.
        """
        self._lengths = np.asarray(lengths, np.int64)
        self._weights = None if weights is None else np.asarray(weights, np.float64)
        self.batch_tokens, self.max_batch_sequences, self.seed = batch_tokens, max_batch_sequences, seed
        self.packing: Packing = packing
        self._epochs: dict[int, list[tuple[int, ...]]] = {}
        self._counts: dict[int, int] = {}
        self._packs: list[tuple[int, ...]] | None = None
        """Of `fixed` packing."""
        check_budget(batch_tokens, max_batch_sequences)
        check_packing(packing, [] if self._weights is None else np.unique(self._weights).tolist())
        if not self._lengths.size:
            raise ConfigError("no samples to make batches of; give data with at least one trainable sample")
        longest = int(self._lengths.argmax())
        if self._lengths[longest] > batch_tokens:
            raise ConfigError(
                f"sample {longest} has {self._lengths[longest]} tokens, more than data.batch_tokens={batch_tokens}; "
                f"raise it, or cut samples with data.max_length={batch_tokens}"
            )

    def __repr__(self) -> str:
        fixed = ", the same in every epoch" if self.packing == "fixed" else ""
        return f"BatchPlan({self._lengths.size} samples, {self.batch_tokens} tokens a batch{fixed}, seed {self.seed})"

    def epoch(self, epoch: int) -> list[tuple[int, ...]]:
        """The batches of one epoch (from 0), in order, as sample numbers."""
        if epoch not in self._epochs:
            packs = self._packed(epoch)
            order = np.argsort(random_keys(len(packs), self.seed, epoch, 1), kind="stable")
            self._epochs = {epoch: [packs[i] for i in order.tolist()]}  # a run reads one epoch at a time
        return self._epochs[epoch]

    def num_batches(self, epoch: int) -> int:
        """How many batches one epoch has; epochs that pack their samples anew differ a little."""
        if self.packing == "fixed":
            return len(self._packed(epoch))
        if epoch not in self._counts:
            self._counts[epoch] = len(self.epoch(epoch))
        return self._counts[epoch]

    def num_tokens(self, members: tuple[int, ...]) -> int:
        """Tokens of a batch."""
        return int(self._lengths[list(members)].sum())

    def places(self, epoch: int, index: int = 0) -> Iterator[Place]:
        """The batches of one epoch from number `index` on, not packed."""
        batches = self.epoch(epoch)
        for number in range(index, len(batches)):
            yield Place(epoch, number, batches[number], self.num_tokens(batches[number]))

    def _packed(self, epoch: int) -> list[tuple[int, ...]]:
        """The batches of one epoch, not in order yet."""
        if self.packing == "anew":
            return self._build(epoch)
        if self._packs is None:
            self._packs = self._build(0)
        return self._packs

    def _build(self, epoch: int) -> list[tuple[int, ...]]:
        chosen = self._chosen(epoch)
        if not chosen.size:
            return []
        shuffled = chosen[np.argsort(random_keys(chosen.size, self.seed, epoch, 0), kind="stable")]
        per_batch = max(1, int(self.batch_tokens // self._lengths[chosen].mean()))
        if self.max_batch_sequences:
            per_batch = min(per_batch, self.max_batch_sequences)
        group = GROUP_BATCHES * per_batch
        batches: list[tuple[int, ...]] = []
        for at in range(0, shuffled.size, group):
            members = shuffled[at : at + group]
            batches += self._fill(members[np.argsort(self._lengths[members], kind="stable")])
        return batches

    def _chosen(self, epoch: int) -> NDArray[np.int64]:
        """The samples of one epoch, ascending, each as often as it comes."""
        numbers = np.arange(self._lengths.size)
        if self._weights is None:
            return numbers
        whole = np.floor(self._weights)
        # 32 bits of a phase and of the share leave the sums exact.
        phase = (random_keys(numbers.size, self.seed, 0, 2) >> np.uint64(32)).astype(np.float64) / 2**32
        share = np.round((self._weights - whole) * 2**32) / 2**32
        more = np.floor(phase + share * (epoch + 1)) - np.floor(phase + share * epoch)
        return np.repeat(numbers, (whole + more).astype(np.int64))

    def _fill(self, members: NDArray[np.int64]) -> Iterator[tuple[int, ...]]:
        """Consecutive members, as many in each batch as its budget holds."""
        batch: list[int] = []
        used = 0
        for i, length in zip(members.tolist(), self._lengths[members].tolist(), strict=True):
            if batch and (used + length > self.batch_tokens or len(batch) == self.max_batch_sequences):
                yield tuple(batch)
                batch, used = [], 0
            batch.append(i)
            used += length
        yield tuple(batch)


class Place(msgspec.Struct, frozen=True):
    """A batch of the plan, before it is packed. tokens: how many it has."""

    epoch: int
    index: int
    samples: tuple[int, ...]
    tokens: int


class Loader:
    """The batches of `epochs` epochs. Iterating over it gives all of them, from the first on."""

    __slots__ = ("_payloads", "_plan", "_samples", "epochs")

    def __init__(self, samples: Samples, plan: BatchPlan, *, epochs: int = 1, payloads: Payloads | None = None) -> None:
        """payloads: what samples bring for the target beside their tokens, made ahead; None for text alone."""
        self._samples, self._plan, self.epochs, self._payloads = samples, plan, epochs, payloads
        if epochs < 1:
            raise ConfigError(f"train.epochs={epochs}: expected at least 1")
        if not any(map(plan.num_batches, range(epochs))):
            raise ConfigError(
                f"no sample is trained in {epochs} epochs with these data.weights; expected weights, epochs or samples "
                f"that give at least one"
            )

    def __repr__(self) -> str:
        return f"Loader({self._plan!r}, {self.epochs} epochs)"

    @property
    def plan(self) -> BatchPlan:
        """Which samples come when."""
        return self._plan

    @property
    def num_batches(self) -> int:
        """How many batches all epochs have in total."""
        return sum(map(self._plan.num_batches, range(self.epochs)))

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        return self.remaining(0, 0)

    def batches(self, epoch: int, index: int = 0) -> Iterator[Batch]:
        """The batches of one epoch (from 0), from number `index` on; none from the epoch's length on."""
        yield from self.packed(self.places_of(epoch, index))

    def before(self, epoch: int, index: int) -> int:
        """How many batches there are before number `index` of `epoch`, without gaps."""
        return sum(map(self._plan.num_batches, range(epoch))) + index

    def remaining(self, epoch: int, index: int) -> Iterator[Batch]:
        """All batches of the run from number `index` of `epoch` on; `index` may be the length of that epoch."""
        yield from self.packed(self.places(epoch, index))

    def places(self, epoch: int, index: int) -> Iterator[Place]:
        """The same, not packed."""
        for current in range(epoch, self.epochs):
            yield from self.places_of(current, index if current == epoch else 0)

    def places_of(self, epoch: int, index: int = 0) -> Iterator[Place]:
        """The same of one epoch (from 0), which may be any: whoever trains more than `epochs` asks for them here."""
        return self._plan.places(epoch, index)

    def packed(self, places: Iterable[Place]) -> Iterator[Batch]:
        """The batches of places, with what their samples bring."""
        batches = map(self._pack, places)
        yield from self._payloads.beside(batches) if self._payloads else batches

    def _pack(self, place: Place) -> Batch:
        members = place.samples
        tokens = [self._samples.tokens(i) for i in members]
        return Batch(
            tokens=np.concatenate(tokens),
            lengths=np.array([part.size for part in tokens], np.int32),
            loss_mask=np.concatenate([self._samples.loss_mask(i) for i in members]),
            samples=members,
            epoch=place.epoch,
            index=place.index,
        )


def random_keys(count: int, seed: int, epoch: int, purpose: int) -> NDArray[np.uint64]:
    """`count` pseudo-random numbers; sorting by them shuffles. purpose: another one, other numbers.

    Splitmix64 (Steele, Lea and Flood, 2014) in place of numpy's generators, whose permutations may change from one
    version to the next: a resumed run must see the very same epoch.
    """
    mixed = np.zeros(1, np.uint64)
    for part in (seed, epoch, purpose):
        mixed = _splitmix(mixed + np.uint64(part & 0xFFFFFFFFFFFFFFFF))
    return _splitmix(mixed + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _splitmix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
