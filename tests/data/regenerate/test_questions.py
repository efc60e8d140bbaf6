"""Questions by number from disk, each with a key of what is asked."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from chats import talk, write_rows
from specd.config.settings import DataConfig
from specd.data.faults import Faults
from specd.data.regenerate.questions import Question, Questions, read_questions

TOOL = {"type": "function", "function": {"name": "t"}}


def read(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> tuple[list[Question], list[str], Faults]:
    faults = Faults()
    with closing(Questions(tmp_path)) as questions:
        count = read_questions(
            DataConfig(path=write_rows(tmp_path / "in.jsonl", *rows), **options),
            lambda question: len(question.groups),
            questions,
            faults,
        )
        assert count == len(questions) + len(faults)
        assert list(questions.sizes) == [len(questions[number].groups) for number in range(len(questions))]
        return [questions[number] for number in reversed(range(len(questions)))][::-1], questions.keys, faults


def test_a_question_is_what_is_asked_and_the_other_columns(tmp_path: Path) -> None:
    rows = [{"messages": talk("A?", "old", "B?", "old"), "tools": [TOOL], "id": 7, "finish_reason": "stop"}]
    (question,), _, _ = read(tmp_path, *rows)
    assert question.groups == [talk("A?"), talk("B?")]
    assert (question.tools, question.kept) == ([TOOL], {"id": 7})
    assert question.where == "in.jsonl line 1"


def test_the_key_is_that_of_the_question_alone(tmp_path: Path) -> None:
    same = [{"messages": talk("A?", "old"), "id": 1}, {"messages": talk("A?"), "id": 2}]
    other = [{"messages": talk("A?"), "tools": [TOOL]}, {"messages": talk("A?", "x", "B?")}]
    _, keys, _ = read(tmp_path, *same, *other)
    assert keys[1] == f"{keys[0]}-2"
    assert len({keys[0], keys[2], keys[3]}) == 3
    assert not any("-" in key for key in (keys[0], *keys[2:]))


def test_bad_rows_are_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]]
    rows = [{"messages": talk("A?")}, {"messages": [{"role": "bard", "content": "x"}]}, {"text": "Once."}, {"odd": 1}]
    questions, _, faults = read(tmp_path, *rows)
    assert len(questions) == 1
    assert {fault.kind for fault in faults.found()} == {"unknown role", "no question", "unknown columns"}


def test_only_the_first_rows(tmp_path: Path) -> None:
    questions, _, _ = read(tmp_path, *({"messages": talk(f"{i}?")} for i in range(4)), max_samples=2)
    assert [question.groups[0][0]["content"] for question in questions] == ["0?", "1?"]


def test_columns_of_any_kind_are_kept_as_well_as_json_can(tmp_path: Path) -> None:
    """As images are in rows of a hub data set."""
    with closing(Questions(tmp_path)) as questions:
        kept = {"image": Path("a/b"), "raw": b"x", "n": 2**70}
        questions.add(Question(where="row 1", key="k", groups=[talk("A?")], kept=kept), 1)
        assert questions[0].kept == {"image": "a/b", "raw": "eA==", "n": 2**70}
