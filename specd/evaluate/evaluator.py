"""Evaluation of an exported draft with its target, on held-out prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from specd.data.chat import Chat
from specd.data.forms import conversation, questions
from specd.data.rows import HELDOUT, read_rows
from specd.data.tokenizer import end_tokens
from specd.drafts import registry
from specd.drafts.directory import draft_directory
from specd.errors import ConfigError
from specd.evaluate.decode import evaluate, greedy
from specd.evaluate.results import EvalFacts

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
    prompts: Path | str = HELDOUT,
    *,
    name: str = "",
    template: dict[str, Any] | None = None,
    limit: int = 0,
    max_new_tokens: int = 64,
    untrained: int | Path | None = None,
    progress: Progress = unseen,
) -> dict[str, EvalFacts]:
    """Decode prompts with a draft and without it: acceptance length, and whether every output is identical.

    draft: its directory, or that of the run that exported it. model, tokenizer: its target, a causal LM of
    transformers. prompts: conversations, as a file or hub name; each first question is asked, the first `limit` of
    them, 0 for all. name: of the target, for the record. template: variables of the chat template. untrained: the seed
    of its training, or the draft that it began with, to decode with its initial weights, too. Returns the results by
    name: `untrained` if asked for, `trained`.
    Raises ConfigError for a draft that is not this target's, a target without a tokenizer or a limit below 0,
    CheckpointError for a directory that holds no draft.
    """
    name, source, directory = name or str(getattr(model, "name_or_path", "")), str(prompts), draft_directory(draft)
    if tokenizer is None:
        raise ConfigError(
            f"target {name!r} has no tokenizer: evaluation needs its chat template; add its tokenizer files"
        )
    if limit < 0:
        raise ConfigError(f"limit={limit}: expected a number of prompts, or 0 for all")
    trained = registry.read(directory)
    drafts = {}
    if untrained is not None:
        first = registry.read(untrained) if isinstance(untrained, Path) else trained.untrained(untrained)
        drafts["untrained"] = first
    weights = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    depth = int(model.config.get_text_config().num_hidden_layers)
    drafters = {which: one.drafter(*weights, depth) for which, one in (drafts | {"trained": trained}).items()}
    asked = encode_prompts(source, Chat(tokenizer, template or {}), limit)
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
            source=source,
            dtype=str(model.dtype).removeprefix("torch."),
            result=result,
        )
    return results


def encode_prompts(source: str, chat: Chat, limit: int) -> list[list[int]]:
    """Token ids of the first question of each conversation in `source`, up to where the target begins its answer."""
    tokenizer: Any = chat.tokenizer
    texts = [
        chat.render(questions(conversation(row, where), where)[0], open_answer=True, tools=row.get("tools") or None)
        for where, row in read_rows(source, limit=limit)
    ]
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
