"""Real decoding while a run goes on: a few held-out prompts, the draft as it is, and the target at its daemon.

The target has no cache there: a text is read anew for each block of guesses, as one more batch. That costs a few
hundred short forwards, and works for whatever a daemon hosts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from specd.client.subscriber import Subscriber
from specd.config.settings import ValidationConfig
from specd.data.dataset import Dataset
from specd.drafts import registry
from specd.drafts.base import Objective, TargetParts
from specd.errors import ConfigError
from specd.evaluate.decode import Generation, continued
from specd.protocol.batch import Batch, Delivery, slot_layout
from specd.protocol.capture import CaptureSpec
from specd.train.validation import Held

DOCUMENT_TOKENS = 256
"""Of a sample whose first token is a label already, at most so many are the prompt."""


class States(Protocol):
    """What a Subscriber is used for here; its spec has `final`."""

    def stream(self, batches: Iterable[Batch]) -> Iterator[Delivery]: ...


class Acceptance(msgspec.Struct, frozen=True, kw_only=True):
    """As in an Evaluation: acceptance_length over all prompts, acceptance_by_offset of all blocks."""

    acceptance_length: float
    acceptance_by_offset: tuple[float, ...]


class Decoder:
    """Decodes the same prompts each time it is asked.

    source: of states of the target that `parts` are of. eos: ids that end a text. scratch: where the draft is written
    for a moment, so that what decodes is what is published.
    """

    __slots__ = ("_device", "_eos", "_max_new_tokens", "_parts", "_prompts", "_scratch", "_source")

    def __init__(
        self,
        source: States,
        parts: TargetParts,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos: Sequence[int],
        device: str,
        scratch: Path,
    ) -> None:
        self._source, self._parts, self._prompts = source, parts, [*prompts]
        self._max_new_tokens, self._eos, self._device, self._scratch = max_new_tokens, tuple(eos), device, scratch

    def __repr__(self) -> str:
        return f"Decoder({len(self._prompts)} prompts, at most {self._max_new_tokens} tokens each)"

    def measure(self, objective: Objective) -> Acceptance:
        """The acceptance length of the draft as it is now. Raises what `Subscriber.stream` raises."""
        with tempfile.TemporaryDirectory(dir=self._scratch, prefix=".decoded-") as place:
            objective.export(Path(place) / "draft")
            draft = registry.read(Path(place) / "draft")
        contract = self._parts.contract
        embedding, head = self._parts.frozen(torch.device(self._device), self._parts.embedding.dtype)
        drafter = draft.drafter(embedding, head, contract.num_layers)
        limits: dict[str, Any] = {"max_new_tokens": self._max_new_tokens, "eos": self._eos}
        texts = [continued(StreamedText(self._source, head), drafter, prompt, **limits) for prompt in self._prompts]
        return _acceptance(texts)


class StreamedText:
    """A text that a target reads at its daemon. head: its lm_head [V, H], in the dtype of its logits."""

    __slots__ = ("_head", "_source", "_tokens")

    def __init__(self, source: States, head: Tensor) -> None:
        self._source, self._head = source, head
        self._tokens: list[int] = []

    def forward(self, tokens: Sequence[int], *, last_only: bool = False) -> tuple[Tensor, Tensor]:
        """The next tokens of the text -> what logits grow with [tokens or 1, V], and the taps [tokens, n·H]."""
        self._tokens += tokens
        count = len(self._tokens)
        batch = Batch(
            tokens=np.array(self._tokens, np.int32),
            lengths=np.array([count], np.int32),
            loss_mask=np.zeros(count, np.bool_),
            samples=(0,),
        )
        found: list[tuple[Tensor, Tensor]] = []
        for delivery in self._source.stream([batch]):
            assert delivery.final is not None, "asked for"
            final = delivery.final[-1 if last_only else -len(tokens) :].to(self._head.dtype)
            taps = delivery.taps
            wanted = final[:, :0] if taps is None else taps[-len(tokens) :].flatten(1).clone()
            found.append((F.linear(final, self._head).float(), wanted))
        return found[0]

    def keep(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        del self._tokens[length:]


def prompts_of(
    dataset: Dataset,
    held: Held,
    config: ValidationConfig,
    spec: CaptureSpec,
    hidden_size: int,
    slot_bytes: int,
    longest: int,
) -> list[list[int]]:
    """What the held-out rows ask: their tokens before the first label, one prompt a row; rows with images ask nothing.

    slot_bytes: of the daemon's slots, longest: positions of the target, 0 for any number; a text has to fit both.
    Raises ConfigError when none does.
    """
    found: dict[int, list[int]] = {}
    for i in np.flatnonzero(held.samples).tolist():
        labels = np.flatnonzero(dataset.loss_mask(i))
        size = int(labels[0]) or min(DOCUMENT_TOKENS, dataset.tokens(i).size)
        whole = size + config.max_new_tokens
        fits = slot_layout(spec, hidden_size, whole).nbytes <= slot_bytes and (not longest or whole <= longest)
        if fits and not dataset.pictures(i):
            found.setdefault(int(dataset.rows[i]), dataset.tokens(i)[:size].tolist())
        if len(found) == config.prompts:
            break
    if not found:
        raise ConfigError(
            f"validation.decode_every={config.decode_every}: of {held.rows} held-out rows no prompt and "
            f"validation.max_new_tokens={config.max_new_tokens} fit the slots and the positions of the target; lower "
            f"the latter, or set the former to 0"
        )
    return list(found.values())


def _acceptance(texts: Sequence[Generation]) -> Acceptance:
    forwards = sum(text.forwards for text in texts)
    tokens = sum(len(text.tokens) - 1 for text in texts)
    drafted, accepted = (
        np.array(counts).sum(0) for counts in zip(*((t.drafted, t.accepted) for t in texts), strict=True)
    )
    return Acceptance(
        acceptance_length=tokens / forwards if forwards else 1.0,
        acceptance_by_offset=tuple((accepted / np.maximum(drafted, 1)).tolist()),
    )


def decoder(
    config: ValidationConfig,
    source: Subscriber,
    parts: TargetParts,
    dataset: Dataset,
    held: Held,
    eos: Sequence[int],
    *,
    device: str,
    run: Path,
) -> Decoder:
    """The decoder of a run, whose directory is `run`. Raises ConfigError for a target that cannot be decoded so."""
    contract = source.contract
    if contract.odd_logits:
        raise ConfigError(
            f"validation.decode_every={config.decode_every}: target {contract.model}: {contract.odd_logits}, so what "
            f"it writes does not follow from its states; set it to 0, and use `specd eval`"
        )
    text = parts.config.get("text_config") or parts.config
    longest = int(text.get("max_position_embeddings") or 0)
    prompts = prompts_of(dataset, held, config, source.spec, contract.hidden_size, source.ring.slot_bytes, longest)
    return Decoder(source, parts, prompts, max_new_tokens=config.max_new_tokens, eos=eos, device=device, scratch=run)
