"""A file of conversations answered anew by a target, resumable, in the file's order."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta

from specd.config.settings import DataConfig
from specd.data.faults import Fault, Faults, RowError
from specd.data.forms import Turn
from specd.data.regenerate.log import AnswerLog, unfinished
from specd.data.regenerate.questions import Question, Questions, read_questions
from specd.data.regenerate.talk import Reply, following
from specd.errors import ConfigError, DataError
from specd.paths import replacing

logger = logging.getLogger(__name__)


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the target writes. max_new_tokens: of one answer, 0 for as many as the target can. temperature: 0 is greedy.

    top_p: samples from the most likely tokens of that probability. seed: of the samples.
    """

    max_new_tokens: Annotated[int, Meta(ge=0)] = 0
    temperature: Annotated[float, Meta(ge=0)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: int = 0


class Answerer(Protocol):
    """Who answers: the target in this process, or a server."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that answers depend on beside their question, as JSON has it."""
        ...

    def size(self, question: Question) -> int:
        """How long its first prompt is. Raises RowError for one that cannot be answered."""
        ...

    def answers(
        self, questions: Questions, kept: Container[int]
    ) -> Generator[tuple[int, Reply | RowError], None, None]:
        """The answers to all `questions`, as they come, by number; those in `kept` may be left out.

        A question that turns out not to be answerable gives its error.
        """
        ...


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Progress of a regeneration. samples: of `total`, those answered, kept ones included.

    tokens, seconds: of this run alone, without kept work. shortened: conversations that end before their last question
    because it did not fit. left_out: rows that cannot be answered.
    """

    samples: int
    total: int
    tokens: int
    seconds: float
    shortened: int = 0
    left_out: tuple[Fault, ...] = ()


def regenerate(
    config: DataConfig,
    answerer: Answerer,
    out: Path,
    *,
    overwrite: bool = False,
    on_answer: Callable[[Progress], None] | None = None,
) -> Progress:
    """Write the conversations of `config` to `out` (JSONL, their order) with every answer by `answerer`.

    Answers that a row already has are dropped; a conversation of several turns is answered turn by turn. Each
    answer has its `finish_reason` beside `content`: `length` if it was cut off. overwrite: replace `out` if it exists,
    once all answers are there. on_answer: called before the first answer and after each.

    Rows that cannot be answered stop it, as `config.bad_rows` says, before the first answer where that can be known.
    Answers are kept beside `out` until all are there, by their question: a second call resumes where the first one
    stopped, also when rows were added or removed. Raises DataError for rows that cannot be used, ConfigError when `out`
    exists or holds unfinished work under other settings, and what `answerer` raises.
    """
    if out.exists() and not overwrite:
        raise ConfigError(f"{str(out)!r} exists already; give --overwrite to replace it, or another --output")
    log = AnswerLog(unfinished(out), answerer.settings)
    with closing(log), closing(Questions(out.parent)) as questions:
        job = _Job(config, answerer, questions, log)
        job.read()
        job.answer(on_answer)
        job.finish(out)
        return job.progress()


class _Job:
    def __init__(self, config: DataConfig, answerer: Answerer, questions: Questions, log: AnswerLog) -> None:
        self._config, self._answerer, self._questions, self._log = config, answerer, questions, log
        self._faults = Faults()
        self._rows = self._tokens = self._samples = self._shortened = 0
        self._path = config.path if isinstance(config.path, str) else ", ".join(config.path)
        self._begun = time.monotonic()

    def read(self) -> None:
        """Read and measure all questions, and stop or log where rows cannot be answered."""
        self._rows = read_questions(self._config, self._answerer.size, self._questions, self._faults)
        self._stop()
        for fault in self._faults.found():
            logger.warning("%d rows are left out, %s, the first: %s", fault.rows, fault.kind, fault.first)

    def answer(self, on_answer: Callable[[Progress], None] | None) -> None:
        """Get the answers that are not kept yet, and keep each."""
        keys = self._questions.keys
        kept = {number for number, key in enumerate(keys) if key in self._log}
        for number in kept:
            self._count(number, self._log[keys[number]])
        if len(kept) == len(keys):
            return
        self._begun = time.monotonic()
        if on_answer is not None:
            on_answer(self.progress())
        with closing(self._answerer.answers(self._questions, kept)) as found:
            for number, reply in found:
                if number in kept:
                    continue
                if isinstance(reply, RowError):
                    logger.warning("left out: %s", reply)
                    self._faults.add(reply)
                    self._stop()
                    continue
                self._log[keys[number]] = reply
                self._tokens += reply.num_tokens
                self._count(number, reply)
                if on_answer is not None:
                    on_answer(self.progress())

    def finish(self, out: Path) -> None:
        """Write `out` from the kept answers."""
        if not self._samples:
            first = "".join(f"; {fault.rows} × {fault.kind}: {fault.first}" for fault in self._faults.found())
            raise DataError(f"none of the {self._rows} rows of {self._path} can be answered{first}")
        with self._log.writing(), replacing(out) as file:
            for number, key in enumerate(self._questions.keys):
                if key in self._log:
                    file.write(_line(self._questions[number], self._log[key]))
        self._log.remove()

    def progress(self) -> Progress:
        return Progress(
            samples=self._samples,
            total=len(self._questions),
            tokens=self._tokens,
            seconds=time.monotonic() - self._begun,
            shortened=self._shortened,
            left_out=self._faults.found(),
        )

    def _count(self, number: int, reply: Reply) -> None:
        self._samples += 1
        self._shortened += len(reply.answers) < len(self._questions[number].groups)

    def _stop(self) -> None:
        if self._config.bad_rows == "stop":
            self._faults.stop(self._path, self._rows)


def _line(question: Question, reply: Reply) -> bytes:
    """The row to write."""
    messages: list[Turn] = []
    for group, answer in zip(question.groups, reply.answers, strict=False):
        messages += [*following(messages, group), answer]
    row: dict[str, Any] = {"messages": messages, **question.kept}
    if question.tools is not None:
        row["tools"] = question.tools
    if question.options:
        row["chat_template_kwargs"] = question.options
    if reply.input_ids is not None:
        row |= {"input_ids": reply.input_ids, "loss_mask": reply.loss_mask}
    return msgspec.json.encode(row) + b"\n"
