"""One conversation while it is answered, turn by turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from specd.data.forms import Conversation, Turn
from specd.data.regenerate.questions import Question

FinishReason = Literal["stop", "length"]


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The target's answers to one question, one for each group of its turns, fewer when no further one fitted.

    num_tokens: that the target wrote. input_ids, loss_mask: the conversation as the target read and wrote it, kept
    where its text alone would not give the same labels, else None.
    """

    answers: list[Turn]
    num_tokens: int
    input_ids: list[int] | None = None
    loss_mask: list[int] | None = None


def following(turns: list[Turn], group: list[Turn]) -> list[Turn]:
    """`group` as it follows `turns`: results of tools name the calls of the answer before, as templates check."""
    calls = turns[-1].get("tool_calls") if turns else None
    ids = iter([call["id"] for call in calls or [] if call.get("id")])
    return [
        {**turn, "tool_call_id": next(ids, turn["tool_call_id"])} if turn.get("tool_call_id") else turn
        for turn in group
    ]


class Talk:
    """The turns so far, and the tokens the target has read and written as long as they are one sequence.

    A template that rewrites the turns before an answer breaks that sequence; then `ids` is empty.
    """

    __slots__ = ("_cut", "ids", "mask", "num_tokens", "question", "turns", "written")

    def __init__(self, question: Question) -> None:
        self.question = question
        self.turns: list[Turn] = []
        self.written: list[Turn] = []
        self.ids: list[int] = []
        self.mask: list[int] = []
        self.num_tokens = 0
        self._cut: set[int] = set()

    @property
    def done(self) -> bool:
        return len(self.written) == len(self.question.groups)

    def ask(self) -> list[Turn]:
        """All turns up to the next answer."""
        return self.turns + following(self.turns, self.question.groups[len(self.written)])

    def answer(
        self, turn: Turn, finish_reason: FinishReason, num_tokens: int, prompt: Sequence[int], ids: Sequence[int]
    ) -> None:
        """Take the next answer. prompt, ids: the tokens that were read and written for it, empty if unknown."""
        linked = bool(ids) and (not self.written or bool(self.ids)) and [*prompt[: len(self.ids)]] == self.ids
        self.mask = self.mask + [0] * (len(prompt) - len(self.ids)) + [1] * len(ids) if linked else []
        self.ids = [*prompt, *ids] if linked else []
        self.turns = [*self.ask(), turn]
        self.written.append({**turn, "finish_reason": finish_reason})
        self.num_tokens += num_tokens
        if finish_reason == "length":
            self._cut.add(len(self.turns) - 1)

    def labels(self) -> list[int]:
        """The tokens that the target wrote."""
        return [token for token, label in zip(self.ids, self.mask, strict=True) if label]

    def conversation(self) -> Conversation:
        """As training will read it."""
        asked = self.question
        return Conversation(turns=self.turns, tools=asked.tools, cut=frozenset(self._cut), options=asked.options)

    def reply(self, *, with_ids: bool) -> Reply:
        kept = with_ids and bool(self.ids)
        return Reply(
            answers=self.written,
            num_tokens=self.num_tokens,
            input_ids=self.ids if kept else None,
            loss_mask=self.mask if kept else None,
        )
