"""What a row holds is found by its columns, by their names in the file, or by what `data.format` says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chats import talk
from specd.config.settings import DataConfig
from specd.data.faults import RowError
from specd.data.forms import COLUMNS, Conversation, Form, Text, Tokens, check, conversation, questions, read
from specd.errors import ConfigError

AUTO = DataConfig()
TOLD = Conversation(turns=talk("Hi", "Hello."))
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "rain", "parameters": {}}}


def form(row: dict[str, Any], **settings: Any) -> Form:
    return read(row, "row 1", DataConfig(**settings))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": talk("Hi", "Hello.")},
        {"messages": json.dumps(talk("Hi", "Hello."))},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {"conversation": talk("Hi", "Hello.")},
        {"prompt": "Hi", "completion": "Hello."},
        {"prompt": talk("Hi"), "completion": talk("Hi", "Hello.")[1:]},
        {"prompt": talk("Hi"), "completion": "Hello."},
        {"prompt": "Hi", "completion": talk("Hi", "Hello.")[1:]},
        {"prompt": json.dumps(talk("Hi")), "completion": json.dumps(talk("Hi", "Hello.")[1:])},
        {"prompt": "Hi", "chosen": json.dumps(talk("Hi", "Hello.")), "rejected": "[]"},
        {"prompt": "Hi", "response": "Hello."},
        {"instruction": "Hi", "output": "Hello."},
        {"instruction": "Hi", "input": "", "output": "Hello.", "text": "### Instruction:\nHi\n### Response:\nHello."},
        {"question": "Hi", "answer": "Hello."},
        {"query": "Hi", "response": "Hello."},
        {"chosen": talk("Hi", "Hello."), "rejected": talk("Hi", "What?")},
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "What?"},
        {"prompt": "Hi", "chosen": talk("Hi", "Hello."), "rejected": talk("Hi", "What?")},
        {"prompt": talk("Hi"), "chosen": talk("Hi", "Hello.")[1:], "rejected": talk("Hi", "What?")[1:]},
        {"messages": talk("Hi", "Hello."), "prompt": "Hi", "prompt_id": "3", "text": "no", "chosen": None},
    ],
)
def test_conversations_in_every_form(row: dict[str, Any]) -> None:
    assert form(row) == form(row, format="conversations") == conversation(row, "row 1") == TOLD


def test_an_input_stands_behind_its_instruction_and_a_history_before_it() -> None:
    row = {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day", "history": [["Hi", "Hello."]]}
    assert form(row) == Conversation(turns=talk("Hi", "Hello.", "Translate.\nGuten Tag", "Good day"))
    with pytest.raises(RowError, match=r"row 1: `history` is .*; expected a list of pairs"):
        form(row | {"history": ["Hi"]})
    with pytest.raises(RowError, match=r"row 1: `input` is \['Guten Tag'\]; expected a string"):
        form(row | {"input": ["Guten Tag"]})


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_prompt_beside_the_turns(column: str) -> None:
    told = Conversation(turns=[SYSTEM, *talk("Hi", "Hello.")])
    assert form({column: "Be brief.", "conversations": talk("Hi", "Hello.")}) == told
    assert form({column: "Be brief.", "prompt": "Hi", "completion": "Hello."}) == told
    assert form({column: "Be long.", "messages": told.turns}) == told
    for none in ("", None):
        assert form({column: none, "messages": talk("Hi", "Hello.")}) == TOLD


def test_places_of_answers_move_with_a_system_prompt() -> None:
    turns = talk("Hi", "Hello, and", "And?", "Fine.")
    turns[1] |= {"finish_reason": "length"}
    turns[3] |= {"weight": 0}
    found = form({"system": "Be brief.", "messages": turns})
    assert isinstance(found, Conversation)
    assert (sorted(found.cut), sorted(found.context)) == ([2], [4])


def test_answers_in_a_prompt_are_context() -> None:
    found = form({"prompt": talk("Hi", "Hello.", "And?"), "completion": talk("x", "Fine.")[1:]})
    assert found == Conversation(turns=talk("Hi", "Hello.", "And?", "Fine."), context=frozenset({1}))
    chosen = form({"chosen": talk("Hi", "Hello.", "And?", "Fine."), "rejected": talk("Hi", "Hello.", "And?", "Bad.")})
    assert chosen == Conversation(turns=talk("Hi", "Hello.", "And?", "Fine."))


def test_tools_and_template_variables_of_a_row() -> None:
    row = {"messages": talk("Hi", "Hello."), "chat_template_kwargs": {"enable_thinking": False, "effort": None}}
    wanted = Conversation(turns=TOLD.turns, tools=[TOOL], options={"enable_thinking": False})
    for tools in ({"tools": [TOOL]}, {"tools": json.dumps([TOOL])}, {"tools": None, "functions": [TOOL["function"]]}):
        assert form(row | tools) == wanted
    with pytest.raises(RowError, match=r"row 1: `chat_template_kwargs` is 'no'; expected an object"):
        form(row | {"chat_template_kwargs": "no"})
    with pytest.raises(RowError, match="row 1: `tools` holds 'rain'"):
        form(row | {"tools": "rain"})


def test_a_row_that_was_cut_was_cut_in_its_last_answer() -> None:
    row: dict[str, Any] = {"messages": talk("Hi", "Hello.", "And?", "Fine, and"), "finish_reason": "length"}
    assert form(row) == Conversation(turns=row["messages"], cut=frozenset({3}))
    assert form(row | {"finish_reason": "stop"}) == Conversation(turns=row["messages"])


def test_texts() -> None:
    assert form({"text": "Once upon a time"}) == Text(text="Once upon a time")
    assert form({"text": "Once", "url": "x", "prompt": "y"}) == Text(text="Once")
    asked = {"prompt": "2 + 2 =", "completion": " 4"}
    assert form(asked, format="text") == Text(text="2 + 2 = 4", prompt=7)
    assert form({"prompt": "2 + 2 ="}, format="text") == Text(text="2 + 2 =", prompt=7)
    for row in ({"text": 3}, {"text": ["a"]}):
        with pytest.raises(RowError, match=r"row 1: `text` is .*; expected a string"):
            form(row)
    with pytest.raises(RowError, match=r"row 1: `completion` is 4; expected a string"):
        form({"prompt": "2 + 2 =", "completion": 4}, format="text")


def test_tokens_come_first() -> None:
    found = form({"input_ids": [5, 6], "labels": [-100, 6], "text": "a b", "messages": talk("Hi", "Hello.")})
    assert isinstance(found, Tokens)
    assert found.loss_mask.tolist() == [False, True]


def test_a_format_looks_at_its_own_columns_alone() -> None:
    row = {"input_ids": [5, 6], "text": "a b", "messages": talk("Hi", "Hello.")}
    assert isinstance(form(row, format="tokens"), Tokens)
    assert isinstance(form(row, format="text"), Text)
    assert isinstance(form(row, format="conversations"), Conversation)
    with pytest.raises(RowError, match=r"expected what data\.format=tokens reads: input_ids; data\.columns maps"):
        form({"text": "a"}, format="tokens")


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"messages": "dialogue"}, {"dialogue": talk("Hi", "Hello.")}),
        ({"prompt": "ask", "completion": "reply"}, {"ask": "Hi", "reply": "Hello.", "text": "no", "prompt": "no"}),
        ({"instruction": "ask", "output": "reply"}, {"ask": "Hi", "reply": "Hello."}),
        ({"prompt": "q", "response": "a"}, {"q": "Hi", "a": "Hello.", "messages": talk("no", "no")}),
        ({"chosen": "best"}, {"best": talk("Hi", "Hello."), "input_ids": [3]}),
    ],
)
def test_columns_by_the_names_of_the_file(columns: dict[str, str], row: dict[str, Any]) -> None:
    assert form(row, columns=columns) == TOLD


def test_other_columns_by_the_names_of_the_file() -> None:
    assert form({"body": "Once", "text": "no"}, columns={"text": "body"}) == Text(text="Once")
    found = form({"messages": talk("Hi", "Hello."), "api": [TOOL]}, columns={"tools": "api"})
    assert found == Conversation(turns=TOLD.turns, tools=[TOOL])
    found = form({"ids": [1, 2], "target": [-100, 2]}, columns={"input_ids": "ids", "labels": "target"})
    assert isinstance(found, Tokens)
    assert form({"text": "Once"}, columns={"text": "body"}) == Text(text="Once")
    with pytest.raises(RowError, match=r"row 1: `text` \(the file's 'body'\) is null"):
        form({"body": None}, columns={"text": "body"})
    with pytest.raises(
        RowError, match=r"columns \['txt'\]; .*; data\.columns maps text to 'body', which it does not have"
    ):
        form({"txt": "Once"}, columns={"text": "body"})


def test_names_that_specd_does_not_read_are_a_wrong_setting() -> None:
    config = DataConfig(columns={"promt": "question", "messages": "dialogue"})
    for refused in (lambda: check(config), lambda: read({"question": "Hi"}, "row 1", config)):
        with pytest.raises(
            ConfigError, match=r"^data\.columns maps 'promt': expected a name .*specd reads messages, con"
        ):
            refused()
    check(DataConfig(columns=dict.fromkeys(COLUMNS, "x")))


@pytest.mark.parametrize(
    ("row", "kind", "said"),
    [
        (
            {"words": "Hi", "id": 3},
            "unknown columns",
            r"has the columns \['id', 'words'\]; expected `messages` or `conv",
        ),
        ({}, "unknown columns", r"has the columns \[\]"),
        ({"text": None, "messages": None, "id": 3}, "nothing in it", "`text` is null, `messages` is null"),
        ({"conversations": []}, "no turns", r"'conversations' is \[\]"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant"}]}, "no content", "turn 2"),
        ({"prompt": "Hi", "completion": None}, "no content", "`completion` is null; expected an answer, or no such"),
        ({"prompt": 3, "completion": "Hello."}, "no content", r"turn 1 \(user\) has content 3"),
        ({"prompt": "Hi", "completion": 3}, "no content", r"turn 1 \(assistant\) has content 3"),
        ({"prompt": "Hi", "completion": []}, "no turns", r"'completion' is \[\]"),
        ({"chosen": "Hello.", "rejected": "What?"}, "no prompt", "`chosen` is an answer alone; expected `prompt`"),
        (
            {"input": "Hi", "output": "Hello."},
            "no prompt",
            r"`output` is an answer alone; .*which of \['input', 'output'\]",
        ),
        ({"request": {}, "response": {"choices": []}}, "no prompt", "`response` is an answer alone; expected `prompt`"),
        ({"input_ids": [1], "labels": [2]}, "labels that are other tokens", "`labels` holds 2"),
    ],
)
def test_what_is_no_form_is_named(row: dict[str, Any], kind: str, said: str) -> None:
    with pytest.raises(RowError, match=f"^chats.jsonl line 7: {said}") as caught:
        read(row, "chats.jsonl line 7", AUTO)
    assert caught.value.kind == kind


@pytest.mark.parametrize("said", ['[{"role": "clerk"}]', "[{", '[{"name": "a", "role": null}]', "[1]"])
def test_json_that_is_no_turns_is_what_was_said(said: str) -> None:
    assert form({"prompt": said, "completion": said}) == Conversation(turns=talk(said, said))


def test_columns_within_each_other_without_end_are_a_fault() -> None:
    tools: list[Any] = []
    for _ in range(2000):
        tools = [{"more": tools}]
    with pytest.raises(RowError, match=r"^row 1: holds lists and objects within each other more deeply") as caught:
        form({"messages": talk("Hi", "Hello."), "tools": tools})
    assert caught.value.kind == "nested too deeply"


def test_every_form_is_listed_to_whoever_has_none_of_them() -> None:
    with pytest.raises(RowError) as caught:
        read({"words": "Hi"}, "row 1", AUTO)
    for name in ("messages", "conversations", "prompt", "completion", "instruction", "output", "chosen", "text",
                 "input_ids", "labels", "loss_mask", "data.columns"):  # fmt: skip
        assert name in str(caught.value)


def test_questions_are_what_leads_up_to_each_answer() -> None:
    first, _, second = talk("Hi", "Hello.", "And?")

    def asked(turns: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        return questions(Conversation(turns=turns), "row 1")

    assert asked([SYSTEM, *talk("Hi", "Hello.", "And?", "Fine.")]) == [[SYSTEM, first], [second]]
    assert asked(talk("Hi")) == [[first]]
    for empty in ([SYSTEM], [{"role": "assistant", "content": "Hello."}]):
        with pytest.raises(RowError, match="row 1: no user turn to answer"):
            asked(empty)


@pytest.mark.parametrize(
    "row",
    [{"prompt": "Hi"}, {"instruction": "Hi"}, {"question": "Hi"}, {"prompt": talk("Hi")}, {"messages": talk("Hi")}],
)
def test_a_prompt_alone_is_a_question(row: dict[str, Any]) -> None:
    assert questions(conversation(row, "row 1"), "row 1") == [talk("Hi")]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["user", "{}", "[3]"]),
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "from", "content", "value", "weight", "tool_calls", "type", "text"]), below
        )
    ),
    max_leaves=12,
)


@given(
    row=st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=5),
    format=st.sampled_from(["auto", "conversations", "text", "tokens"]),
)
@settings(max_examples=1000, deadline=None)
def test_whatever_stands_in_a_row_it_is_a_form_or_a_fault(row: dict[str, Any], format: str) -> None:
    try:
        found = form(row, format=format)
    except RowError:
        return
    if isinstance(found, Conversation):
        assert found.turns
        assert all(isinstance(turn["content"], str) for turn in found.turns)
        assert all(0 <= place < len(found.turns) for place in found.cut | found.context)
    elif isinstance(found, Text):
        assert 0 <= found.prompt <= len(found.text)
    else:
        assert found.ids.size == found.loss_mask.size
