"""Marks tell where the texts of a conversation stand, and leave no trace."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from chats import talk
from specd.data.marks import Mark, Marked


def written(turns: list[dict[str, Any]]) -> str:
    return "".join(f"{turn['role']}:{turn['content']};" for turn in turns)


def test_marks_stand_around_each_text_within_its_white_space() -> None:
    turns = talk("Hi", "  Hello. \n")
    marked = Marked(turns, written(turns))
    text, marks = marked.read(written(marked.turns))
    assert text == "user:Hi;assistant:  Hello. \n;"
    assert [text[a.at : b.at] for a, b in zip(marks[::2], marks[1::2], strict=True)] == ["Hi", "Hello."]
    assert [mark.turn for mark in marks] == [0, 0, 1, 1]
    assert turns == talk("Hi", "  Hello. \n")


def test_a_text_that_is_written_twice_or_not_at_all() -> None:
    marked = Marked(talk("Hi", "Hello."), "")
    text, marks = marked.read(marked.turns[0]["content"] * 2)
    assert text == "HiHi"
    assert marks == [Mark(0, 0, False), Mark(2, 0, False), Mark(2, 0, True), Mark(4, 0, True)]


def test_trimming_and_splitting_do_as_without_marks() -> None:
    turns = talk("Hi", " \n<think>\nWell.\n</think>\n\nHello. ")
    marked = Marked(turns, "").turns[1]["content"]
    read = Marked(turns, "").read
    for change in (str.strip, lambda s: s.split("</think>")[-1].lstrip("\n"), lambda s: s.split("<think>")[0]):
        assert read(change(marked))[0] == change(turns[1]["content"])


def test_thoughts_calls_and_arguments_have_marks_of_their_own() -> None:
    call = {"id": "1", "function": {"name": "look", "arguments": {"at": "it", "all": [True, "of it"], "n": 2}}}
    turns = [{"role": "assistant", "content": "", "reasoning_content": "Well.", "tool_calls": [call]}]
    marked = Marked(turns, "")
    (turn,) = marked.turns
    function = turn["tool_calls"][0]["function"]
    shown = turn["reasoning_content"] + function["name"] + function["arguments"]["at"] + function["arguments"]["all"][1]
    assert marked.read(shown)[0] == "Well.lookitof it"
    assert len(marked.read(shown)[1]) == 8
    assert (turn["content"], turn["tool_calls"][0]["id"], function["arguments"]["n"]) == ("", "1", 2)
    assert turns[0]["tool_calls"] == [call]


def test_plain_leaves_what_a_template_may_look_for_alone() -> None:
    turns = talk("/no_think Hi there.", "<think>\nWell.", "", "[1]", "One, two.")
    marked = Marked(turns, "", blank=False, plain=True)
    contents = [turn["content"] for turn in marked.turns]
    assert contents[0].startswith("/no_think Hi there.")
    assert contents[1].startswith("<think>\nWell.")
    assert contents[1] != turns[1]["content"]
    assert contents[2:4] == ["", "[1]"]
    assert marked.unmarked == {2, 3}
    assert Marked(turns, "", blank=False).unmarked == {2}
    assert not Marked(turns, "").unmarked


def test_a_call_that_is_no_object_is_left_alone() -> None:
    turns = [{"role": "assistant", "content": "Hi", "tool_calls": ["look"]}]
    assert Marked(turns, "").turns[0]["tool_calls"] == ["look"]


@given(st.lists(st.text("a \n\U00100000\U00100001\U000f0000", max_size=6), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_characters_of_the_text_are_no_marks(contents: list[str]) -> None:
    turns = talk(*contents)
    marked = Marked(turns, written(turns))
    text, marks = marked.read(written(marked.turns))
    assert text == written(turns)
    assert len(marks) == 2 * len(turns)
