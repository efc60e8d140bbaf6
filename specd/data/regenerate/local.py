"""Answers by a model of transformers in this process."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Container, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from specd.data.chat import Chat
from specd.data.faults import RowError
from specd.data.regenerate.job import Sampling
from specd.data.regenerate.questions import Question, Questions
from specd.data.regenerate.talk import FinishReason, Reply, Talk
from specd.data.tokenizer import Encoder, end_tokens
from specd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """What the target wrote. ids: its end token included. finish_reason: `length` when it was cut off before one."""

    ids: list[int]
    finish_reason: FinishReason


class Local:
    """Conversations of similar length answered together, as one left-padded batch with a KV cache.

    Greedy answers can depend on the batch in the last bits; the same file gives the same batches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        target: str,
        batch_size: int = 16,
        template: Mapping[str, Any] | None = None,
        date: str = "",
    ) -> None:
        """target: its name, kept with unfinished work. template: variables of the chat template. date: the day that
        one is told which asks for it.

        Raises ConfigError when neither `sampling` nor the target limits an answer, DataError without a chat template.
        """
        self._model, self._sampling, self._batch_size = model, sampling, batch_size
        if not tokenizer.chat_template:
            raise DataError(
                f"{target} knows no turns (its tokenizer has no chat template), so there is nothing that it answers: "
                f"train on documents, as `text` rows, or name an instruction-tuned target"
            )
        self._encoder = Encoder(tokenizer)
        self._stops = end_tokens(model, tokenizer)
        self._chat = Chat(tokenizer, template, date=date, ends=self._stops)
        self._positions = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0)
        if not (sampling.max_new_tokens or self._positions):
            raise ConfigError("the target names no longest text (max_position_embeddings); give --max-new-tokens")
        self.settings: dict[str, Any] = {
            "target": target,
            "batch_size": batch_size,
            "template": dict(template or {}),
            **msgspec.to_builtins(sampling),
        }
        if self._chat.asks_clock:
            self.settings["date"] = date

    def size(self, question: Question) -> int:
        return len(self._prompt(Talk(question)))

    def answers(
        self, questions: Questions, kept: Container[int]
    ) -> Generator[tuple[int, Reply | RowError], None, None]:
        order = sorted(range(len(questions)), key=lambda i: (questions.sizes[i], i))
        for at in range(0, len(order), self._batch_size):
            batch = order[at : at + self._batch_size]
            if all(number in kept for number in batch):
                continue
            talks = [Talk(questions[number]) for number in batch]
            self._answer(talks)
            for number, talk in zip(batch, talks, strict=True):
                yield number, talk.reply(with_ids=not self._is_text(talk))

    def _answer(self, talks: Sequence[Talk]) -> None:
        """Answer every turn of `talks`; one whose next prompt cannot be written or is too long ends before it."""
        going = list(talks)
        while going := [talk for talk in going if not talk.done]:
            prompts: list[list[int]] = []
            asked: list[Talk] = []
            for talk in going:
                try:
                    prompts.append(self._prompt(talk))
                    asked.append(talk)
                except RowError as error:
                    logger.info("ends after answer %d: %s", len(talk.written), error)
            going = asked
            for talk, prompt, written in zip(going, prompts, self._generate(prompts), strict=True):
                ended = written.finish_reason == "stop"
                text = self._chat.tokenizer.decode(
                    written.ids[: -1 if ended else None], skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
                turn = {"role": "assistant", "content": text}
                talk.answer(turn, written.finish_reason, len(written.ids), prompt, written.ids)

    def _prompt(self, talk: Talk) -> list[int]:
        """The tokens up to the next answer. Raises RowError when the template refuses them or no answer fits."""
        question = talk.question
        text = self._chat.render(
            talk.ask(), open_answer=True, tools=question.tools, options=question.options, where=question.where
        )
        ids: list[int] = self._chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self._positions and len(ids) >= self._positions:
            raise RowError(
                question.where,
                "too long for the target",
                f"its prompt of {len(ids)} tokens leaves no room for an answer within the target's "
                f"{self._positions} positions; shorten it",
            )
        return ids

    def _generate(self, prompts: Sequence[list[int]]) -> list[Written]:
        """The next answer to each prompt, in smaller batches where memory does not suffice."""
        import torch

        if not prompts:
            return []
        longest = self._sampling.max_new_tokens
        room = [self._positions - len(prompt) if self._positions else longest for prompt in prompts]
        budgets = [min(left, longest) if longest else left for left in room]
        try:
            return generate(self._model, prompts, budgets, self._stops, self._sampling)
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise ConfigError(
                    f"a prompt of {len(prompts[0])} tokens and up to {budgets[0]} new ones do not fit into memory; "
                    f"give a lower --max-new-tokens"
                ) from None
        logger.warning("%d conversations do not fit into memory together; answering them in halves", len(prompts))
        half = len(prompts) // 2
        return self._generate(prompts[:half]) + self._generate(prompts[half:])

    def _is_text(self, talk: Talk) -> bool:
        """Whether training reads from the turns exactly what the target has read and written."""
        try:
            rendered = self._chat.conversation(talk.conversation(), talk.question.where)
        except RowError:
            return False
        ((tokens, mask),) = self._encoder.encode([rendered])
        read: list[int] = tokens.tolist()
        labels: list[int] = tokens[mask].tolist()
        return read[: len(talk.ids)] == talk.ids and labels == talk.labels()


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    budgets: Sequence[int],
    stops: Sequence[int],
    sampling: Sampling,
) -> list[Written]:
    """What the target writes after each of `prompts`, up to and with one of `stops`, at most `budgets[i]` tokens."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), stops[0])
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(prompts):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    ends = torch.tensor(budgets, device=model.device) + width

    class Budgets(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids.shape[1] >= ends

    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    with torch.inference_mode(), torch.random.fork_rng(enabled=bool(sampling.temperature)):
        if sampling.temperature:
            torch.manual_seed(zlib.crc32(repr(prompts).encode(), sampling.seed))
        written: Any = model.generate(  # type: ignore[operator]  # mixed in by transformers at run time
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(budgets),
            stopping_criteria=StoppingCriteriaList([Budgets()]),
            eos_token_id=list(stops),
            pad_token_id=stops[0],
            **options,
        )
    rows = written[:, width:].tolist()
    return [_read(row[:budget], stops) for row, budget in zip(rows, budgets, strict=True)]


def _read(row: list[int], stops: Sequence[int]) -> Written:
    end = next((at for at, token in enumerate(row) if token in stops), None)
    if end is None:
        return Written(ids=row, finish_reason="length")
    return Written(ids=row[: end + 1], finish_reason="stop")
