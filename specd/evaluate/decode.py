"""Greedy speculative decoding as evaluation: a draft's acceptance length, and proof that it changes no output.

Target and draft both keep their caches: nothing is computed twice. Batch size 1. A float32 target shows identity
best: a coarser dtype rounds the same text differently in a block than token by token, and breaks ties of its logits.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from specd.drafts.base import Drafter
from specd.errors import ConfigError
from specd.evaluate.results import ROUNDINGS, Evaluation, Mismatch, PromptResult


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """One generated text.

    tokens: after the prompt, up to and including the end token. forwards: target forwards after the prompt's.
    seconds: wall time, the prompt included. drafted, accepted: per offset 1, 2, … how many blocks verified a guess
    there, and in how many it and all before it were right.
    """

    tokens: tuple[int, ...]
    forwards: int
    seconds: float
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()


class Text(Protocol):
    """One text, as its target reads it."""

    def forward(self, tokens: Sequence[int], *, last_only: bool = False) -> tuple[Tensor, Tensor]:
        """The next tokens -> logits [tokens or 1, V], or what has the same order, and the taps [tokens, n·H]."""
        ...

    def keep(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        ...


@torch.inference_mode()
def greedy(model: Any, prompt: Sequence[int], *, max_new_tokens: int, eos: Collection[int]) -> Generation:
    """The target's own greedy text: one token a forward, with its cache.

    model: a transformers causal LM. prompt: at least one token id. eos: ids that end the text,
    as of `tokenizer.end_tokens`.
    """
    began = time.perf_counter()
    target = _CachedModel(model, ())
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
    """The same text by speculative decoding, as `continued`. Arguments as of `greedy`."""
    return continued(_CachedModel(model, drafter.taps), drafter, prompt, max_new_tokens=max_new_tokens, eos=eos)


@torch.inference_mode()
def continued(
    target: Text, drafter: Drafter, prompt: Sequence[int], *, max_new_tokens: int, eos: Collection[int]
) -> Generation:
    """A text by speculative decoding: the draft guesses a block, one forward of its target verifies all of it.

    The longest prefix of right guesses is accepted, plus the target's own token after it. target: with nothing read.
    """
    began = time.perf_counter()
    drafted, accepted = np.zeros((2, drafter.block_size - 1), np.int64)
    drafter.reset()
    logits, taps = target.forward(_checked(prompt, max_new_tokens), last_only=True)
    drafter.extend(torch.tensor(prompt, device=taps.device), taps)
    tokens, forwards = [int(logits[-1].argmax())], 0
    while tokens[-1] not in eos and len(tokens) < max_new_tokens:
        # A block verifies one token more than it guesses, and yields at most as many as it verifies.
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
        read = torch.tensor([tokens[-1], *new[:-1]], device=taps.device)
        tokens += new
        target.keep(len(prompt) + len(tokens) - 1)
        drafter.extend(read, taps[: len(new)])
    return Generation(
        tokens=tuple(tokens),
        forwards=forwards,
        seconds=time.perf_counter() - began,
        drafted=tuple(drafted.tolist()),
        accepted=tuple(accepted.tolist()),
    )


def evaluate(
    model: Any,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos: Collection[int],
    references: Sequence[Generation] | None = None,
    progress: Callable[[int, PromptResult], None] | None = None,
) -> Evaluation:
    """Decode every prompt with the draft and without it, and compare the texts token by token.

    drafter: None measures the target alone. references: the target's own texts of an earlier evaluation of the same
    prompts and limits, to save time. progress: called with index and result after each prompt.
    """
    drafter = drafter or _NoDrafter()
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
                drafted=text.drafted,
                accepted=text.accepted,
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

    def extend(self, tokens: Tensor, taps: Tensor) -> None: ...

    def propose(self, token: int) -> Tensor:
        return torch.empty(0, dtype=torch.int64)


class _CachedModel:
    """A causal LM with the KV cache of one text."""

    def __init__(self, model: Any, taps: tuple[int, ...]) -> None:
        from transformers import DynamicCache

        self._model, self._taps = model, taps
        # Without the model's config every layer keeps all its keys, so that any layer can be cut back.
        self._cache = DynamicCache()
        takes = inspect.signature(model.forward).parameters
        self._given = {"cache" if "cache" in takes else "past_key_values": self._cache}  # the former since 5.24

    def forward(self, tokens: Sequence[int], *, last_only: bool = False) -> tuple[Tensor, Tensor]:
        """The next tokens of the text -> logits [tokens or 1, V] and the taps [tokens, n·H]."""
        output = self._model(
            torch.tensor([tokens], device=self._model.device),
            **self._given,
            use_cache=True,
            output_hidden_states=bool(self._taps),
            logits_to_keep=1 if last_only else 0,
        )
        states = [output.hidden_states[tap + 1][0] for tap in self._taps]
        return output.logits[0], torch.cat(states, -1) if states else output.logits.new_empty(len(tokens), 0)

    def keep(self, length: int) -> None:
        """Crop the cache to the first `length` tokens."""
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
    logits = _CachedModel(model, ()).forward([*prompt, *own.tokens[:at]], last_only=True)[0][-1].float()
    return Mismatch(
        prompt=index,
        position=at,
        expected=expected,
        got=got,
        margin=float(logits[expected] - logits[got]),
        rounding=ROUNDINGS * torch.finfo(model.dtype).eps * float(logits.abs().max()),
    )
