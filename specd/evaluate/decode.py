"""Greedy speculative decoding as evaluation: what a draft is worth, and proof that it changes nothing.

Target and draft both keep their caches: nothing is computed twice. Batch size 1. A float32 target shows identity
best: a coarser dtype rounds the same text otherwise in a block than token by token, and ties of its logits fall apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from specd.drafts.block_attention import BlockLayout, plain_attention
from specd.drafts.dflash.model import DFlashDraft, KeyValue
from specd.errors import ConfigError

DEFINITION = (
    "acceptance length = tokens generated after the first, divided by target forwards after the prompt's own; each of "
    "them yields the guesses it accepts and one token of the target's; the first token comes from the prompt's "
    "forward and is not counted; tokens cut off by the end of the text or by max_new_tokens are not counted either, so "
    "1.0 is plain decoding"
)
ROUNDINGS = 4
"""Two logits within so many epsilons of the largest |logit| are a tie.

Two runs compute two logits each, and each of the four is off by up to one epsilon: half for its own rounding, half for
that of the states under it.
"""


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

    def extend(self, taps: Tensor) -> None:
        """The target's states [tokens, n·H] of the next tokens of the text, each token once and in order."""
        ...

    def propose(self, token: int) -> Tensor:
        """Guesses int64 [block_size − 1] for what follows `token`, the text's last, whose states are not known yet."""
        ...


class DFlashDrafter:
    """A trained DFlash draft as a Drafter. embedding, lm_head: the target's [V, H], in the dtype to compute in."""

    def __init__(self, draft: DFlashDraft, embedding: Tensor, lm_head: Tensor) -> None:
        shape = draft.shape
        if embedding.shape != (shape.vocab_size, shape.hidden_size):
            raise ConfigError(
                f"the draft is for a target of vocabulary {shape.vocab_size} and hidden size {shape.hidden_size}, "
                f"this one has {embedding.shape[0]} and {embedding.shape[1]}: evaluate it with its own target"
            )
        self._draft = draft.to(embedding.device)
        self._embedding, self._lm_head = embedding, lm_head
        self._cache: list[KeyValue] = []

    @property
    def taps(self) -> tuple[int, ...]:
        return self._draft.shape.taps

    @property
    def block_size(self) -> int:
        return self._draft.shape.block_size

    def reset(self) -> None:
        self._cache = []

    def extend(self, taps: Tensor) -> None:
        known = self._cache[0][0].shape[0] if self._cache else 0
        positions = torch.arange(known, known + taps.shape[0], device=taps.device)
        new = self._draft.context(taps.to(self._embedding.dtype), positions)
        # Only the context is kept: a block's own keys are guesses, and the target's states replace them.
        self._cache = [
            (torch.cat((old[0], more[0])), torch.cat((old[1], more[1])))
            for old, more in zip(self._cache, new, strict=True)
        ] if self._cache else new  # fmt: skip

    def propose(self, token: int) -> Tensor:
        shape, device = self._draft.shape, self._embedding.device
        known = self._cache[0][0].shape[0]
        start, anchor = np.zeros(1, np.int64), np.full(1, known, np.int64)
        layout = BlockLayout(starts=start, anchors=anchor, block_size=shape.block_size, num_context=known)
        tokens = torch.full((shape.block_size,), shape.mask_token_id, device=device)
        tokens[0] = token
        positions = torch.arange(known, known + shape.block_size, device=device)
        attend = plain_attention(layout, device)
        states = self._draft.block(F.embedding(tokens, self._embedding), positions, self._cache, attend)
        return F.linear(states[1:], self._lm_head).argmax(-1)


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """One text. tokens: what follows the prompt, the end token included if it came. forwards: target forwards after

    the prompt's. seconds: wall time, the prompt included. drafted, accepted: per offset 1, 2, … how many blocks
    verified a guess there, and in how many it and all before it were right.
    """

    tokens: tuple[int, ...]
    forwards: int
    seconds: float
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()


class PromptResult(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt of an evaluation; the times are wall seconds of the whole text, its prompt included."""

    prompt_tokens: int
    new_tokens: int
    forwards: int
    acceptance_length: float
    identical: bool
    seconds: float
    greedy_seconds: float


class Mismatch(msgspec.Struct, frozen=True, kw_only=True):
    """The first difference between a text and the target's own. expected, got: tokens there, None past the end.

    margin: by how much the expected token's logit leads the other's when the target reads the text up to there at once.
    rounding: what the rounding of the target's dtype can make of it: ROUNDINGS · epsilon · the largest |logit| there.
    """

    prompt: int
    position: int
    expected: int | None
    got: int | None
    margin: float
    rounding: float = 0.0

    @property
    def tie(self) -> bool:
        """Whether the two logits are equal as far as rounding lets anyone know: no fault of the decoding."""
        return self.expected is not None and self.got is not None and abs(self.margin) <= self.rounding


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What a draft is worth on a set of prompts.

    acceptance_length: over all prompts, as `definition` says. acceptance_by_offset: of the blocks that verified a
    guess at offset 1, 2, …, the share in which it was accepted. identical: every text equals the target's own greedy
    one, token for token. tokens_per_s, greedy_tokens_per_s: with the draft and without it.
    """

    acceptance_length: float
    acceptance_by_offset: tuple[float, ...]
    identical: bool
    mismatches: tuple[Mismatch, ...]
    new_tokens: int
    forwards: int
    tokens_per_s: float
    greedy_tokens_per_s: float
    prompts: tuple[PromptResult, ...]
    definition: str = DEFINITION


@torch.inference_mode()
def greedy(model: Any, prompt: Sequence[int], *, max_new_tokens: int, eos: Collection[int]) -> Generation:
    """The target's own greedy text: one token a forward, with its cache.

    model: a transformers causal LM. prompt: at least one token id. eos: ids that end the text, as of `chat.end_tokens`.
    """
    began = time.perf_counter()
    target = _Target(model, ())
    tokens: list[int] = []
    logits, _ = target.forward(_checked(prompt, max_new_tokens), last_only=True)
    while True:
        tokens.append(int(logits[-1].argmax()))
        if tokens[-1] in eos or len(tokens) == max_new_tokens:
            break
        logits, _ = target.forward(tokens[-1:])
    return Generation(tokens=tuple(tokens), forwards=len(tokens) - 1, seconds=time.perf_counter() - began)


@torch.inference_mode()
def speculate(
    model: Any, drafter: Drafter, prompt: Sequence[int], *, max_new_tokens: int, eos: Collection[int]
) -> Generation:
    """The same text by speculative decoding: the draft guesses a block, one target forward verifies all of it.

    Of a block the longest prefix of right guesses is kept, and the target's own token after it. Arguments as of
    `greedy`.
    """
    began = time.perf_counter()
    target = _Target(model, drafter.taps)
    drafted, accepted = np.zeros((2, drafter.block_size - 1), np.int64)
    drafter.reset()
    logits, taps = target.forward(_checked(prompt, max_new_tokens), last_only=True)
    drafter.extend(taps)
    tokens, forwards = [int(logits[-1].argmax())], 0
    while tokens[-1] not in eos and len(tokens) < max_new_tokens:
        # A block verifies one token more than it guesses, and yields as many as it verifies at most.
        room = min(drafter.block_size, max_new_tokens - len(tokens))
        guesses = drafter.propose(tokens[-1])[: room - 1].tolist() if room > 1 else []
        logits, taps = target.forward([tokens[-1], *guesses])
        forwards += 1
        truth = logits.argmax(-1).tolist()
        right = next((k for k, guess in enumerate(guesses) if guess != truth[k]), len(guesses))
        new = truth[: right + 1]
        end = next((k for k, token in enumerate(new) if token in eos), None)
        if end is not None:
            new = new[: end + 1]
        drafted[: len(guesses) if end is None else min(len(guesses), len(new))] += 1
        accepted[: min(right, len(new))] += 1
        tokens += new
        target.keep(len(prompt) + len(tokens) - 1)
        drafter.extend(taps[: len(new)])
    return Generation(
        tokens=tuple(tokens),
        forwards=forwards,
        seconds=time.perf_counter() - began,
        drafted=tuple(drafted.tolist()),
        accepted=tuple(accepted.tolist()),
    )


def evaluate(
    model: Any,
    draft: DFlashDraft | Drafter | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos: Collection[int],
    references: Sequence[Generation] | None = None,
    progress: Callable[[int, PromptResult], None] | None = None,
) -> Evaluation:
    """Decode every prompt with the draft and without it, and compare the texts token by token.

    draft: None measures the target alone. references: the target's own texts of an earlier evaluation of the same
    prompts and limits, to spare the time. progress: called with index and result after each prompt.
    """
    drafter: Drafter
    if isinstance(draft, DFlashDraft):
        drafter = DFlashDrafter(draft, model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    else:
        drafter = draft or _NoDrafter()
    rows: list[PromptResult] = []
    mismatches: list[Mismatch] = []
    greedy_tokens = 0
    counts = np.zeros((2, drafter.block_size - 1), np.int64)
    for index, prompt in enumerate(prompts):
        limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos": eos}
        own = references[index] if references is not None else greedy(model, prompt, **limits)
        text = speculate(model, drafter, prompt, **limits)
        difference = _difference(model, prompt, index, own, text)
        mismatches += [difference] if difference else []
        greedy_tokens += len(own.tokens)
        counts += np.array((text.drafted, text.accepted), np.int64)
        rows.append(
            PromptResult(
                prompt_tokens=len(prompt),
                new_tokens=len(text.tokens),
                forwards=text.forwards,
                acceptance_length=(len(text.tokens) - 1) / text.forwards if text.forwards else 1.0,
                identical=difference is None,
                seconds=text.seconds,
                greedy_seconds=own.seconds,
            )
        )
        if progress is not None:
            progress(index, rows[-1])
    forwards = sum(row.forwards for row in rows)
    new_tokens = sum(row.new_tokens for row in rows)
    return Evaluation(
        acceptance_length=(new_tokens - len(rows)) / forwards if forwards else 1.0,
        acceptance_by_offset=tuple((counts[1] / np.maximum(counts[0], 1)).tolist()),
        identical=not mismatches,
        mismatches=tuple(mismatches),
        new_tokens=new_tokens,
        forwards=forwards,
        tokens_per_s=new_tokens / max(sum(row.seconds for row in rows), 1e-9),
        greedy_tokens_per_s=greedy_tokens / max(sum(row.greedy_seconds for row in rows), 1e-9),
        prompts=tuple(rows),
    )


class _NoDrafter:
    """Guesses nothing: plain decoding."""

    taps: tuple[int, ...] = ()
    block_size = 1

    def reset(self) -> None: ...

    def extend(self, taps: Tensor) -> None: ...

    def propose(self, token: int) -> Tensor:
        return torch.empty(0, dtype=torch.int64)


class _Target:
    """A causal LM that follows one text, with its cache."""

    def __init__(self, model: Any, taps: tuple[int, ...]) -> None:
        from transformers import DynamicCache

        self._model, self._taps = model, taps
        # Without the model's config every layer keeps all its keys, so that any layer can be cut back.
        self._cache = DynamicCache()

    def forward(self, tokens: Sequence[int], *, last_only: bool = False) -> tuple[Tensor, Tensor]:
        """The next tokens of the text -> logits [tokens or 1, V] and the taps [tokens, n·H]."""
        output = self._model(
            torch.tensor([tokens], device=self._model.device),
            past_key_values=self._cache,
            use_cache=True,
            output_hidden_states=bool(self._taps),
            logits_to_keep=1 if last_only else 0,
        )
        states = [output.hidden_states[tap + 1][0] for tap in self._taps]
        return output.logits[0], torch.cat(states, -1) if states else output.logits.new_empty(len(tokens), 0)

    def keep(self, length: int) -> None:
        """Forget the text after its first `length` tokens."""
        if surplus := self._cache.get_seq_length() - length:
            self._cache.crop(-surplus)


def _checked(prompt: Sequence[int], max_new_tokens: int) -> Sequence[int]:
    if not prompt or max_new_tokens < 1:
        raise ConfigError(
            f"a prompt of {len(prompt)} tokens and max_new_tokens {max_new_tokens}: both must be at least 1"
        )
    return prompt


@torch.inference_mode()
def _difference(model: Any, prompt: Sequence[int], index: int, own: Generation, text: Generation) -> Mismatch | None:
    """Where `text` first differs from the target's own, if it does."""
    if own.tokens == text.tokens:
        return None
    shorter = min(len(own.tokens), len(text.tokens))
    pairs = zip(own.tokens, text.tokens, strict=False)
    at = next((k for k, (a, b) in enumerate(pairs) if a != b), shorter)
    expected, got = (tokens[at] if at < len(tokens) else None for tokens in (own.tokens, text.tokens))
    if expected is None or got is None:
        return Mismatch(prompt=index, position=at, expected=expected, got=got, margin=0.0)
    logits = _Target(model, ()).forward([*prompt, *own.tokens[:at]], last_only=True)[0][-1].float()
    return Mismatch(
        prompt=index,
        position=at,
        expected=expected,
        got=got,
        margin=float(logits[expected] - logits[got]),
        rounding=ROUNDINGS * torch.finfo(model.dtype).eps * float(logits.abs().max()),
    )
