"""A conversation while it is answered: what is asked next, and the tokens as one sequence."""

from __future__ import annotations

from typing import Any

from chats import talk
from specd.data.forms import Conversation
from specd.data.regenerate.questions import Question
from specd.data.regenerate.talk import Reply, Talk


def question(*groups: list[dict[str, Any]], **more: Any) -> Question:
    return Question(where="row 1", key="k", groups=list(groups), **more)


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_each_group_is_asked_after_the_answers_before() -> None:
    one = Talk(question(talk("A?"), talk("B?")))
    assert one.ask() == talk("A?")
    one.answer(said("a"), "stop", 2, [], [])
    assert one.ask() == talk("A?", "a", "B?")
    assert not one.done
    one.answer(said("b"), "length", 3, [], [])
    assert one.done
    answers = [said("a") | {"finish_reason": "stop"}, said("b") | {"finish_reason": "length"}]
    assert one.reply(with_ids=True) == Reply(answers=answers, num_tokens=5)


def test_results_of_tools_name_the_new_calls() -> None:
    results = [{"role": "tool", "content": text, "tool_call_id": f"old{text}"} for text in "12"]
    one = Talk(question(talk("A?"), [*results, {"role": "tool", "content": "3"}]))
    call = {"id": "new", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    one.answer(said("") | {"tool_calls": [call]}, "stop", 2, [], [])
    assert [turn.get("tool_call_id") for turn in one.ask()[2:]] == ["new", "old2", None]
    assert one.question.groups[1] == [*results, {"role": "tool", "content": "3"}]


def test_training_is_told_what_was_cut() -> None:
    one = Talk(question(talk("A?"), talk("B?"), tools=[{}], options={"x": 1}))
    one.answer(said("a"), "length", 2, [], [])
    one.answer(said("b"), "stop", 2, [], [])
    turns = talk("A?", "a", "B?", "b")
    assert one.conversation() == Conversation(turns=turns, tools=[{}], cut=frozenset({1}), options={"x": 1})


def test_tokens_are_one_sequence_as_long_as_each_prompt_goes_on() -> None:
    one = Talk(question(talk("A?"), talk("B?"), talk("C?")))
    one.answer(said("a"), "stop", 2, [1, 2], [3, 4])
    one.answer(said("b"), "stop", 1, [1, 2, 3, 4, 5], [6])
    assert (one.ids, one.mask) == ([1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 0, 1])
    assert one.labels() == [3, 4, 6]
    assert one.reply(with_ids=True).input_ids == one.ids
    assert one.reply(with_ids=False).input_ids is None


def test_a_template_that_rewrites_the_turns_breaks_the_sequence_for_good() -> None:
    one = Talk(question(talk("A?"), talk("B?"), talk("C?")))
    one.answer(said("a"), "stop", 2, [1, 2], [3, 4])
    one.answer(said("b"), "stop", 1, [1, 2, 4, 5], [6])
    assert (one.ids, one.labels()) == ([], [])
    one.answer(said("c"), "stop", 1, [1, 2, 4, 5, 6, 7], [8])
    assert one.reply(with_ids=True).input_ids is None


def test_a_turn_without_ids_breaks_the_sequence() -> None:
    one = Talk(question(talk("A?"), talk("B?")))
    one.answer(said("a"), "stop", 2, [], [])
    one.answer(said("b"), "stop", 1, [1, 2, 4, 5], [6])
    assert one.reply(with_ids=True).input_ids is None
