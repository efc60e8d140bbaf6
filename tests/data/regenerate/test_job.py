"""A file is answered row by row, in its order, once; rows that cannot be are counted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Container, Generator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from chats import talk, write_rows
from specd.config.settings import DataConfig
from specd.data.faults import RowError
from specd.data.regenerate.job import Progress, regenerate
from specd.data.regenerate.questions import Question, Questions
from specd.data.regenerate.talk import Reply, Talk
from specd.errors import ConfigError, DataError

ROWS: list[dict[str, Any]] = [{"messages": talk(f"Q{i}?", "old"), "form": f"f{i}"} for i in range(6)]
TOOL = {"type": "function", "function": {"name": "t"}}
UNANSWERABLE: dict[str, Any] = {"messages": [{"role": "system", "content": "Be brief."}]}


class Echo:
    """Answers backwards; refuses what is longer than 9 characters before, and `no` when it is asked."""

    settings: Mapping[str, Any] = MappingProxyType({"target": "echo"})

    def __init__(self) -> None:
        self.asked: list[str] = []

    def size(self, question: Question) -> int:
        size = len(question.groups[0][-1]["content"])
        if size > 9:
            raise RowError(question.where, "too long", f"has {size} characters")
        return size

    def answers(
        self, questions: Questions, kept: Container[int]
    ) -> Generator[tuple[int, Reply | RowError], None, None]:
        for number in reversed(range(len(questions))):
            question = questions[number]
            talk = Talk(question)
            self.asked += [question.groups[0][-1]["content"]] if number not in kept else []
            if "no" in question.groups[0][-1]["content"]:
                yield number, RowError(question.where, "refused", "is refused")
                continue
            while not talk.done:
                text = f"to {talk.ask()[-1]['content']}"
                talk.answer({"role": "assistant", "content": text}, "stop", 2, [], [])
            yield number, talk.reply(with_ids=True)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def config_of(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> DataConfig:
    return DataConfig(path=write_rows(tmp_path / "in.jsonl", *rows), **options)


def interrupted(config: DataConfig, out: Path, after: int) -> Echo:
    def stop(progress: Progress) -> None:
        if progress.samples == after:
            raise KeyboardInterrupt

    echo = Echo()
    with pytest.raises(KeyboardInterrupt):
        regenerate(config, echo, out, on_answer=stop)
    return echo


def test_rows_keep_their_order_and_their_other_columns(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    beside = {"tools": [TOOL], "n": 0.5, "chat_template_kwargs": {"enable_thinking": False}}
    rows = [*ROWS, {"messages": talk("A?", "x", "B?"), "finish_reason": "stop", **beside}]
    done = regenerate(config_of(tmp_path, *rows), Echo(), out)
    found = lines(out)
    assert [row["messages"][1]["content"] for row in found[:-1]] == [f"to Q{i}?" for i in range(6)]
    assert [row["form"] for row in found[:-1]] == [f"f{i}" for i in range(6)]
    assert [turn["content"] for turn in found[-1]["messages"]] == ["A?", "to A?", "B?", "to B?"]
    assert {key: value for key, value in found[-1].items() if key != "messages"} == beside
    assert (done.samples, done.total, done.tokens, done.shortened) == (7, 7, 16, 0)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_second_call_asks_only_what_is_missing(tmp_path: Path) -> None:
    config, out = config_of(tmp_path, *ROWS), tmp_path / "out.jsonl"
    interrupted(config, out, 4)
    again = Echo()
    done = regenerate(config, again, out)
    assert again.asked == ["Q1?", "Q0?"]
    assert (done.samples, done.tokens) == (6, 4)
    assert [row["messages"][1]["content"] for row in lines(out)] == [f"to Q{i}?" for i in range(6)]


def test_kept_answers_outlive_changes_of_the_file(tmp_path: Path) -> None:
    """Rows removed, added and moved; the columns beside a question are those of the file as it is now."""
    out = tmp_path / "out.jsonl"
    interrupted(config_of(tmp_path, *ROWS), out, 4)
    moved = [{**ROWS[5], "form": "new"}, {"messages": talk("Q9?")}, *ROWS[1:4]]
    again = Echo()
    regenerate(config_of(tmp_path, *moved), again, out)
    assert again.asked == ["Q1?", "Q9?"]
    assert [(row["messages"][0]["content"], row.get("form")) for row in lines(out)] == [
        ("Q5?", "new"), ("Q9?", None), ("Q1?", "f1"), ("Q2?", "f2"), ("Q3?", "f3"),
    ]  # fmt: skip


def test_equal_questions_get_answers_of_their_own(tmp_path: Path) -> None:
    echo = Echo()
    regenerate(config_of(tmp_path, *[ROWS[0]] * 3), echo, tmp_path / "out.jsonl")
    assert echo.asked == ["Q0?"] * 3
    assert len(lines(tmp_path / "out.jsonl")) == 3


def test_rows_that_cannot_be_answered_stop_it_before_the_first_answer(tmp_path: Path) -> None:
    echo = Echo()
    config = config_of(tmp_path, *ROWS, UNANSWERABLE, {"messages": talk("much too long")})
    with pytest.raises(DataError) as caught:
        regenerate(config, echo, tmp_path / "out.jsonl")
    for part in ("2 of 8 rows", "line 7: no user turn", "line 8: has 13 characters", "data.bad_rows=skip"):
        assert part in str(caught.value)
    assert echo.asked == []
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_rows_that_cannot_be_answered_may_be_left_out(tmp_path: Path) -> None:
    config = config_of(tmp_path, ROWS[0], UNANSWERABLE, {"messages": talk("no?")}, ROWS[1], bad_rows="skip")
    done = regenerate(config, Echo(), tmp_path / "out.jsonl")
    assert [row["form"] for row in lines(tmp_path / "out.jsonl")] == ["f0", "f1"]
    assert {(fault.kind, fault.rows) for fault in done.left_out} == {("no question", 1), ("refused", 1)}
    assert done.samples == 2


def test_a_refusal_on_the_way_stops_it_and_keeps_what_was_answered(tmp_path: Path) -> None:
    rows, out = [ROWS[0], {"messages": talk("no?")}, *ROWS[1:4]], tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"1 of 5 rows .*\n.*line 2: is refused"):
        regenerate(config_of(tmp_path, *rows), Echo(), out)
    again = Echo()
    regenerate(config_of(tmp_path, *rows, bad_rows="skip"), again, out)
    assert again.asked == ["no?", "Q0?"]
    assert len(lines(out)) == 4


def test_a_file_without_an_answer_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 1 rows .* can be answered; 1 × refused: .*line 1: is refused"):
        regenerate(config_of(tmp_path, {"messages": talk("no?")}, bad_rows="skip"), Echo(), tmp_path / "out.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_rows_without_a_question_of_another_form(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds a text; expected a conversation or a prompt"):
        regenerate(config_of(tmp_path, {"text": "Once."}), Echo(), tmp_path / "out.jsonl")


def test_an_output_is_replaced_only_on_demand(tmp_path: Path) -> None:
    config, out = config_of(tmp_path, *ROWS), tmp_path / "out.jsonl"
    out.write_text("mine\n")
    with pytest.raises(ConfigError, match="exists already; give --overwrite"):
        regenerate(config, Echo(), out)
    interrupted_out = out.read_text()
    regenerate(config, Echo(), out, overwrite=True)
    assert interrupted_out == "mine\n"
    assert len(lines(out)) == 6


def test_several_files_are_one(tmp_path: Path) -> None:
    first, second = write_rows(tmp_path / "a.jsonl", *ROWS[:2]), write_rows(tmp_path / "b.jsonl", *ROWS[2:])
    regenerate(DataConfig(path=(second, first), max_samples=5), Echo(), tmp_path / "out.jsonl")
    assert [row["form"] for row in lines(tmp_path / "out.jsonl")] == ["f2", "f3", "f4", "f5", "f0"]


def test_a_killed_process_loses_nothing_that_it_reported(tmp_path: Path) -> None:
    config, out = config_of(tmp_path, *ROWS), tmp_path / "out.jsonl"
    script = """
        import sys
        from pathlib import Path
        from specd.config.settings import DataConfig
        from specd.data.regenerate.job import regenerate
        sys.path.insert(0, sys.argv[1])
        from test_job import Echo

        def report(progress):
            print(progress.samples, flush=True)
            if progress.samples == 3:
                sys.stdin.readline()

        regenerate(DataConfig(path=sys.argv[2]), Echo(), Path(sys.argv[3]), on_answer=report)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(Path(__file__).parent), str(config.path), str(out)]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(4)] == ["0\n", "1\n", "2\n", "3\n"]
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    again = Echo()
    regenerate(config, again, out)
    assert again.asked == ["Q2?", "Q1?", "Q0?"]
    assert len(lines(out)) == 6
