"""What a draft brings to training and to decoding: the contracts of the family.

A draft is a folder with a `Method`: static facts and factories, named by the registry or by an entry point of the group
`specd.drafts`. The trainer knows no draft by name: it asks the method what to capture, has it make an `Objective`
beside the target, and trains that. Evaluation asks the method that wrote a directory for a `Drafter`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specd.config.settings import CaptureConfig, Config
from specd.drafts.logits import LogitTransform
from specd.errors import ConfigError
from specd.protocol.batch import Batch, Delivery
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import TargetContract


class Loss(NamedTuple):
    """Sums over one batch, all on the trainer's device; whoever takes the optimizer step divides by the total weight.

    sum: weighted sum over predictions, 0-d float32 with a graph to every parameter. weight: sum of their weights, 0-d
    float32. metrics: `counted` and `correct`, float32 [K]: predictions at offsets 1…K under teacher forcing, and how
    many of them were right; others are sums over the same predictions. A batch without a prediction has sum 0 and
    weight 0.
    """

    sum: Tensor
    weight: Tensor
    metrics: Mapping[str, Tensor]


class Objective(Protocol):
    """A draft in training: its network, its loss, its published format."""

    @property
    def module(self) -> torch.nn.Module:
        """The draft; its trainable parameters are the float32 masters."""
        ...

    def loss(self, delivery: Delivery) -> Loss:
        """The loss of one delivered batch; random choices depend on seed, epoch and sample only."""
        ...

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile what is compiled, before the first batch; leaves weights and gradients as they are. dtype: of states.

        Kernels must be ready for every size a run can bring: a compilation in mid-run stalls the trainer for seconds.
        """
        ...

    def facts(self) -> dict[str, str]:
        """What a person wants to know of the draft, by name: layers, taps, trained parameters."""
        ...

    def export(self, path: Path, files: Mapping[str, bytes] | None = None) -> None:
        """Write the draft to a directory in its published format; `files` (tokenizer and the like) go beside it.

        Asked at each checkpoint, and at the end; it leaves the draft as it is.
        """
        ...


class TargetParts(NamedTuple):
    """What a trainer has of the target, beside its states.

    config: its config.json. embedding, lm_head: [V, H], frozen; one tensor if they share memory.
    label_counts: how often each token is a label of the training data, int64 [V]; None where that is not known.
    """

    contract: TargetContract
    config: dict[str, Any]
    embedding: Tensor
    lm_head: Tensor
    label_counts: NDArray[np.int64] | None = None

    def check(self, vocab_size: int, hidden_size: int) -> None:
        """Raise ConfigError unless tensors, contract and these sizes, of config.json, agree."""
        sizes = (self.contract.vocab_size, self.contract.hidden_size)
        for name, tensor in (("embedding", self.embedding), ("lm_head", self.lm_head)):
            if tensor.shape != sizes:
                raise ConfigError(
                    f"{name} of {self.contract.model} is {list(tensor.shape)}, its contract says {list(sizes)}"
                )
        if (vocab_size, hidden_size) != sizes:
            raise ConfigError(
                f"config.json of {self.contract.model} says vocabulary {vocab_size} and hidden size {hidden_size}, its "
                f"contract {sizes[0]} and {sizes[1]}"
            )

    def embedding_scale(self) -> float:
        """What a draft's inputs are, over the rows of `embedding`. Raises ConfigError where that is no figure."""
        if why := self.contract.odd_embedding:
            raise ConfigError(
                f"target {self.contract.model}: {why}, so a draft would be trained on other inputs than it is served "
                f"with; train one that reads no embedding, or take another target"
            )
        return self.contract.embedding_scale

    def logit_transform(self) -> LogitTransform:
        """The target's logits from products with lm_head. Raises ConfigError where that is not known."""
        if why := self.contract.odd_logits:
            raise ConfigError(
                f"target {self.contract.model}: {why}: a draft cannot learn its distribution; train one that needs "
                f"none, as dflash"
            )
        return LogitTransform(self.contract.logit_scale, self.contract.logit_softcap)

    def frozen(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Embedding and lm_head on `device` in `dtype`; one tensor still if they were one."""
        embedding = self.embedding.detach().to(device, dtype)
        shared = self.embedding.data_ptr() == self.lm_head.data_ptr()
        return embedding, embedding if shared else self.lm_head.detach().to(device, dtype)


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """How the same loss is computed; None is the draft's own choice for the device.

    compiled: the layers run through torch.compile. fused_head: see `head.row_head` and `taught.taught_loss`.
    spread_heads: see `block_attention.flex_attention`.
    """

    compiled: bool | None = None
    fused_head: bool | None = None
    spread_heads: bool = True


class Workload(NamedTuple):
    """What one training step of a batch costs, for the benchmark. rows: tokens that run through the draft's layers.

    predictions: rows that the head is asked for. flops: useful operations of a step, forward and backward, by part; a
    multiplication and an addition are two. parts: parts of a step that can be run, and timed, alone.
    """

    rows: int
    predictions: int
    flops: dict[str, float]
    parts: dict[str, Callable[[], object]]


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

    def extend(self, tokens: Tensor, taps: Tensor) -> None:
        """The next tokens of the text, int64 [tokens], each once and in order, and their taps [tokens, n·H]."""
        ...

    def propose(self, token: int) -> Tensor:
        """Guesses int64 [block_size − 1] for what follows `token`, the text's last, whose states are not known yet."""
        ...


class Draft(Protocol):
    """A draft as it was read from its published directory."""

    def drafter(self, embedding: Tensor, lm_head: Tensor, num_layers: int = 0, embedding_scale: float = 0.0) -> Drafter:
        """The draft for decoding beside a target, in the dtype of the target's embedding and lm_head, both [V, H].

        num_layers: of the target, 0 where the caller does not know. embedding_scale: as in its contract,
        likewise. Raises ConfigError for a target that is not the
        draft's own.
        """
        ...

    def untrained(self, began: int | Path) -> Draft:
        """The same draft with the weights that training began with: those of a seed, or of a draft's directory.

        Raises ConfigError and CheckpointError for a directory as `Method.load`.
        """
        ...


@runtime_checkable
class Reduced(Protocol):
    """A `Draft` that may be read without the part that joins its guesses."""

    def unary(self) -> Draft | None:
        """The same draft with each token of a block guessed by itself; None where it has no such part."""
        ...


class Method(Protocol):
    """What a registry entry points to: a class with static facts and factories, never instantiated.

    title: name and source, for people. settings: its own struct, which `draft` of a RunConfig becomes; where it has a
    `mask_token_id`, the trainer chooses one for −1, and refuses one that the data has. free: settings
    that do not change what is computed, so that a resumed run may have others. consecutive_labels: a sample needs so
    many labels in a row to be trained at all. architectures: what its published config.json may name.
    """

    title: ClassVar[str]
    settings: ClassVar[type[Config]]
    free: ClassVar[frozenset[str]]
    consecutive_labels: ClassVar[int]
    architectures: ClassVar[tuple[str, ...]]

    @staticmethod
    def check(settings: Any, target: str) -> None:
        """Raise ConfigError for settings that cannot work, whatever the target turns out to be. target: its name.

        Asked before a target is loaded or a transport attached.
        """

    @staticmethod
    def capture_config(settings: Any) -> CaptureConfig:
        """What a daemon that is started for this draft sizes its slots for."""
        ...

    @staticmethod
    def capture(settings: Any, contract: TargetContract) -> CaptureSpec:
        """What has to be captured of that target. Raises ConfigError for one that does not suit: too few layers."""
        ...

    @staticmethod
    def objective(
        settings: Any,
        target: TargetParts,
        device: str | torch.device,
        dtype: torch.dtype,
        seed: int = 0,
        tuning: Tuning | None = None,
    ) -> Objective:
        """The draft that is trained. dtype: of its forward. seed: of its weights and of what it draws from samples.

        Raises ConfigError where settings and target do not fit.
        """
        ...

    @staticmethod
    def load(path: Path) -> Draft:
        """Read a draft's directory. Raises ConfigError for one it cannot run, CheckpointError for a damaged one."""
        ...

    @staticmethod
    def workload(objective: Any, batch: Batch) -> Workload:
        """What a training step of `batch` costs."""
        ...
