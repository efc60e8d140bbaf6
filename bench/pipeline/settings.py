"""The settings of `specd bench pipeline`, and its batches: random tokens of two length distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from specd.config.load import convert, merge
from specd.config.presets import preset
from specd.config.settings import Config, DaemonConfig
from specd.data.batching import BatchPlan
from specd.drafts import registry
from specd.drafts.base import Method
from specd.errors import ConfigError
from specd.protocol.batch import Batch
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import TargetContract
from specd.targets.synthetic import synthetic_options

Lengths = Literal["fixed", "log-normal"]
SPREAD: Final = 0.8
"""Standard deviation of the logarithm of the log-normal lengths: the longest fifth is four times the shortest."""
SHORTEST: Final = 16
COLOCATED_DEPTH: Final = 2
"""Batches under way where target and draft share a device, and overlap."""


class SleepConfig(Config, kw_only=True, frozen=True):
    """The options of a draft like `synthetic:ms=20,us_per_token=1`. params: floats of its gradient."""

    ms: float = 0.0
    us_per_token: float = 0.0
    params: int = 1 << 16


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the benchmark; it travels to the processes that measure.

    target: overrides of TargetConfig. devices: of the daemons, one each. trainer: the trainer's device, the first one's
    of several `trainers`, which are ranks of one training; the others have the devices that follow.
    draft: a method, or `synthetic:ms=…` for one that only takes time. draft_config: overrides of the method's settings.
    mask_token_id: of a target without a preset, for methods that mask tokens.
    batch_tokens: of a trainer's batch. sample_tokens: of a sample of fixed length.
    short, many: `many` samples of `short` tokens are what the merging rows run. forward_tokens: most in one forward.
    depths: of the disaggregated rows. steps: timed in each row, after `warmup` others.
    """

    model: str
    target: dict[str, Any] = {}
    devices: tuple[str, ...] = ("cpu",)
    trainer: str = "cpu"
    trainers: int = 1
    transports: tuple[str, ...] = ("shm",)
    draft: str = registry.DEFAULT
    draft_config: dict[str, Any] = {}
    mask_token_id: int = 0
    batch_tokens: int = 3072
    sample_tokens: int = 3072
    lengths: tuple[Lengths, ...] = ("fixed", "log-normal")
    short: int = 512
    many: int = 16
    forward_tokens: int = 8192
    depths: tuple[int, ...] = (0, 1, 2, 4)
    merge_depth: int = 32
    steps: int = 20
    warmup: int = 4
    seed: int = 0

    @property
    def shared(self) -> bool:
        """Whether the trainer has no GPU of its own."""
        return self.trainer != "cpu" and self.trainer in self.devices

    @property
    def num_devices(self) -> int:
        """Devices that daemons and trainers occupy; on the CPU, their processes count as such."""
        return self.devices_of(self.trainers)

    def devices_of(self, trainers: int) -> int:
        """Devices that the daemons and so many of the trainers occupy."""
        return len(self.devices) * self.tp + trainers * (not self.shared)

    @property
    def trainer_devices(self) -> tuple[str, ...]:
        """The device of each trainer."""
        if self.trainer == "cpu":
            return ("cpu",) * self.trainers
        first = int(self.trainer.removeprefix("cuda:"))
        return tuple(f"cuda:{first + index}" for index in range(self.trainers))

    @property
    def tp(self) -> int:
        """Devices of one target."""
        return int(self.target.get("tp", 1))

    @property
    def daemon_devices(self) -> tuple[str, ...]:
        """All devices of all daemons: each one's target is spread over the `tp` devices from its own on."""
        if self.trainer == "cpu":
            return self.devices
        firsts = [int(device.removeprefix("cuda:")) for device in self.devices]
        return tuple(f"cuda:{first + index}" for first in firsts for index in range(self.tp))

    @property
    def slots(self) -> int:
        """Slots of a ring: enough for the deepest row, of one trainer and of all."""
        fed = max(self.fed(self.batch_tokens), self.fed(self.short * self.many))
        alone = max(*self.depths, self.merge_depth, fed) + 2 + self.trainers - 1
        return max(alone, self.trainers * (max(self.depths) + 1))

    @property
    def drawn(self) -> int:
        """Batches of a row: those that warm up, those that are timed, and as many as are under way behind them."""
        return self.warmup + self.steps + max(*self.depths, COLOCATED_DEPTH) + 1

    @property
    def slot_tokens(self) -> int:
        return max(self.batch_tokens, self.short * self.many)

    def room(self, tokens: int) -> int:
        """How many batches of `tokens` tokens fit one forward."""
        return 1 if self.target.get("exact") else max(1, self.forward_tokens // tokens)

    def forwards(self, tokens: Sequence[int], most: int) -> list[slice]:
        """Which of these batches, by their tokens, share a forward where up to `most` wait: as a daemon merges them."""
        if self.target.get("exact"):
            most = 1
        parts: list[slice] = []
        begin = used = 0
        for end, size in enumerate(tokens):
            if end > begin and (end - begin == most or used + size > self.forward_tokens):
                parts.append(slice(begin, end))
                begin, used = end, 0
            used += size
        return [*parts, slice(begin, len(tokens))]

    def merged(self, depth: int, lengths: Lengths) -> int:
        """The most batches of a row that share a forward while `depth` are under way beside the one in use."""
        most = max(1, depth)
        tokens = [sum(sizes) for sizes in sample_lengths(self, lengths, self.steps, self.warmup)] * most
        return max(len(tokens[part]) for part in self.forwards(tokens, most))

    def under_way(self, depth: int, trainers: int) -> int:
        """How many batches may wait at one daemon, of trainers that have `depth` under way beside the one in use."""
        return depth if trainers == 1 else -(-max(1, depth) * trainers // len(self.devices))

    def fed(self, tokens: int) -> int:
        """The depth at which a daemon never waits for a null trainer: one forward runs, one is queued."""
        return 2 * self.room(tokens)

    def daemon(self, device: str, slots: int, sessions: int = 1) -> DaemonConfig:
        """A daemon for this benchmark, over the target's preset. sessions: trainers at once.

        Raises ConfigError for a setting that cannot be.
        """
        recipe = preset(self.model)
        capture = self.method.capture_config(self.draft_settings)
        target = {"model": self.model, "device": device, "max_forward_tokens": self.forward_tokens} | self.target
        asked = {
            "target": merge(recipe.target if recipe else {}, target),
            "capture": {"num_taps": capture.num_taps, "final": capture.final, "dtype": capture.dtype},
            "ring": {"slots": slots, "slot_tokens": self.slot_tokens, "max_sessions": sessions},
            "transports": list(self.transports),
        }
        return convert(asked, DaemonConfig, "specd bench pipeline")

    @property
    def method(self) -> type[Method]:
        """The method of the draft; of one that only takes time, the one it stands for."""
        return registry.load(registry.DEFAULT if self.sleep else self.draft)

    @property
    def draft_settings(self) -> Config:
        """The draft's settings, over those of the target's preset."""
        recipe = preset(self.model)
        name = registry.DEFAULT if self.sleep else self.draft
        under = recipe.run.get(name, {}).get("draft", {}) if recipe else {}
        if "mask_token_id" in self.method.settings.__struct_fields__:
            under = {"mask_token_id": self.mask_token_id} | under
        return registry.settings(name, merge(under, self.draft_config), "specd bench pipeline")

    def capture(self, contract: TargetContract) -> CaptureSpec:
        """What the draft wants captured from a target."""
        return self.method.capture(self.draft_settings, contract)

    @property
    def sleep(self) -> SleepConfig | None:
        """The options of a draft that only takes time, None for one that is trained.

        Raises ConfigError for one that is neither.
        """
        kind, _, _ = self.draft.partition(":")
        if kind == "synthetic":
            options = synthetic_options(self.draft, SleepConfig, "draft")
            if min(options.ms, options.us_per_token, options.params - 1) < 0:
                raise ConfigError(f"draft {self.draft!r}: expected ms ≥ 0, us_per_token ≥ 0, params ≥ 1")
            return options
        if self.draft not in registry.names():
            known = ", ".join(registry.names())
            raise ConfigError(f"draft {self.draft!r}: expected {known} or synthetic:ms=MILLISECONDS")
        return None


def batches(settings: Settings, lengths: Lengths, vocab: int, count: int, nonce: int, shift: int = 0) -> list[Batch]:
    """`count` batches of the trainer's budget.

    nonce: another one gives other tokens of the same lengths, which no ring still has. shift: begins this much later.
    """
    tokens = np.random.default_rng([settings.seed, nonce])
    chosen = sample_lengths(settings, lengths, count, shift)
    return [_batch(tokens, sizes, vocab, index) for index, sizes in enumerate(chosen)]


def sample_lengths(settings: Settings, lengths: Lengths, count: int, shift: int = 0) -> list[list[int]]:
    """Tokens of each sample in each of `count` batches."""
    if lengths == "fixed":
        return [[settings.sample_tokens] * (settings.batch_tokens // settings.sample_tokens)] * count
    drawn = _log_normal(settings)
    packs = BatchPlan(drawn, settings.batch_tokens, seed=settings.seed).epoch(0)
    return [drawn[list(packs[(index + shift) % len(packs)])].tolist() for index in range(count)]


def short_batches(settings: Settings, vocab: int, samples: int, count: int, nonce: int) -> list[Batch]:
    """`count` batches of `samples` samples of `settings.short` tokens."""
    tokens = np.random.default_rng([settings.seed, nonce])
    return [_batch(tokens, [settings.short] * samples, vocab, index) for index in range(count)]


def _log_normal(settings: Settings) -> NDArray[np.int64]:
    """Lengths of a data set that is large enough for one row; their median is a quarter of a batch."""
    median = max(SHORTEST, settings.batch_tokens // 4)
    drawn = np.exp(np.random.default_rng(settings.seed).normal(np.log(median), SPREAD, size=4 * settings.steps))
    return np.clip(drawn, SHORTEST, settings.batch_tokens).astype(np.int64)


def _batch(rng: np.random.Generator, sizes: list[int], vocab: int, index: int) -> Batch:
    total = sum(sizes)
    return Batch(
        tokens=rng.integers(0, vocab, total, dtype=np.int32),
        lengths=np.asarray(sizes, np.int32),
        loss_mask=np.ones(total, np.bool_),
        samples=tuple(range(index * 4096, index * 4096 + len(sizes))),
        index=index,
    )
