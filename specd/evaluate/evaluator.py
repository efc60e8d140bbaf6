"""Evaluation of an exported draft with its target, on held-out prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from specd.config.settings import DataConfig
from specd.data.rows import HELDOUT, sources
from specd.data.tokenizer import end_tokens
from specd.drafts import registry
from specd.drafts.base import Draft, Reduced
from specd.drafts.directory import draft_directory
from specd.errors import ConfigError
from specd.evaluate.decode import evaluate, greedy
from specd.evaluate.prompts import read_prompts
from specd.evaluate.results import EvalFacts
from specd.protocol.capture import CaptureSpec

Progress = Callable[[str, int], contextlib.AbstractContextManager[Callable[[], None]]]
"""From a title and the number of texts, a context that yields a callback for each finished text."""


@contextlib.contextmanager
def unseen(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A Progress that shows nothing."""
    yield lambda: None


def evaluate_draft(
    draft: Path | str,
    model: Any,
    tokenizer: Any,
    prompts: DataConfig | Path | str = HELDOUT,
    *,
    name: str = "",
    limit: int = 0,
    max_new_tokens: int = 64,
    untrained: int | Path | None = None,
    unary: bool = False,
    embedding_scale: float = 0.0,
    progress: Progress = unseen,
) -> dict[str, EvalFacts]:
    """Decode prompts with a draft and without it: acceptance length, and whether every output is identical.

    draft: its directory, or that of the run that exported it. model, tokenizer: its target, a causal LM of
    transformers. prompts: what `read_prompts` makes prompts of, as a file or hub name, or as the settings to read it
    with; the first `limit` of them, 0 for all. name: of the target, for the record. untrained: the seed of its
    training, or the draft that it began with, to decode with its initial weights, too. unary: decode also with each
    token of a block guessed by itself. embedding_scale: the target's, as of a contract, for a warning where the draft
    has another; 0 for none. Returns the results by name: `untrained` and `unary` if asked for, `trained`.
    Raises ConfigError for a draft that is not this target's, or that has nothing to leave out, a target without a
    tokenizer or a limit below 0, CheckpointError for a directory that holds no draft; what `read_prompts` raises.
    """
    data = prompts if isinstance(prompts, DataConfig) else DataConfig(path=str(prompts))
    name, directory = name or str(getattr(model, "name_or_path", "")), draft_directory(draft)
    if tokenizer is None:
        raise ConfigError(
            f"target {name!r} has no tokenizer: evaluation needs it for the prompts; add its tokenizer files"
        )
    if limit < 0:
        raise ConfigError(f"limit={limit}: expected a number of prompts, or 0 for all")
    trained = registry.read(directory)
    drafts = {}
    if untrained is not None:
        drafts["untrained"] = trained.untrained(untrained)
    if unary:
        drafts["unary"] = _unary(trained, directory)
    drafts["trained"] = trained
    weights = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    depth = int(model.config.get_text_config().num_hidden_layers)
    drafters = {which: one.drafter(*weights, depth, embedding_scale) for which, one in drafts.items()}
    for drafter in drafters.values():
        if reason := CaptureSpec(taps=drafter.taps).problem(depth):
            raise ConfigError(f"draft {str(directory)!r} is for another target than {name!r}: {reason}")
    positions = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0)
    found = read_prompts(
        data,
        tokenizer,
        size=len(weights[0]),
        limit=limit,
        longest=max(positions - max_new_tokens, 1) if positions else 0,
    )
    asked = found.ids
    eos: Collection[int] = end_tokens(model, tokenizer)
    # The same target texts prove both drafts.
    with progress("target alone", len(asked)) as advance:
        references = []
        for prompt in asked:
            references.append(greedy(model, prompt, max_new_tokens=max_new_tokens, eos=eos))
            advance()
    results: dict[str, EvalFacts] = {}
    for which, drafter in drafters.items():
        with progress(f"with the {which} draft", len(asked)) as advance:
            result = evaluate(
                model,
                drafter,
                asked,
                max_new_tokens=max_new_tokens,
                eos=eos,
                references=references,
                progress=lambda index, row, advance=advance: advance(),  # type: ignore[misc]
            )
        results[which] = EvalFacts(
            model=name,
            draft=str(directory),
            untrained=which == "untrained",
            block_size=drafter.block_size,
            max_new_tokens=max_new_tokens,
            source=", ".join(map(str, sources(data))),
            bad=found.bad,
            dtype=str(model.dtype).removeprefix("torch."),
            result=result,
        )
    return results


def _unary(draft: Draft, directory: Path) -> Draft:
    """The draft without the part that joins its guesses. Raises ConfigError where it has none."""
    alone = draft.unary() if isinstance(draft, Reduced) else None
    if alone is None:
        raise ConfigError(
            f"draft {str(directory)!r} guesses each token by itself: expected one with a part that joins them, as "
            f"dflash2's or dspark's, to leave out; leave --unary out"
        )
    return alone
