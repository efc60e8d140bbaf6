"""Answers that are kept are found again, and whatever was being written at a kill is not."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from specd.data.regenerate.log import AnswerLog, settings_of
from specd.data.regenerate.talk import Reply
from specd.errors import ConfigError

SETTINGS: dict[str, Any] = {"target": "tiny", "max_new_tokens": 4}


def reply(text: str) -> Reply:
    return Reply(answers=[{"role": "assistant", "content": text}], num_tokens=2, input_ids=[1, 2], loss_mask=[0, 1])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "out.jsonl.partial"


def fill(path: Path, *keys: str) -> None:
    with closing(AnswerLog(path, SETTINGS)) as log:
        for key in keys:
            log[key] = reply(f"to {key}")


def test_answers_are_found_by_their_question(path: Path) -> None:
    fill(path, "a", "b")
    fill(path, "c")
    with closing(AnswerLog(path, SETTINGS)) as log:
        assert [key in log for key in "abcd"] == [True, True, True, False]
        assert [log[key] for key in "cab"] == [reply("to c"), reply("to a"), reply("to b")]
        log["d"] = reply("to d")
        assert (log["d"], log["a"], len(log)) == (reply("to d"), reply("to a"), 4)


def test_only_what_was_being_written_is_lost(path: Path) -> None:
    """Wherever the file ends: a prefix of the answers is there, and further ones can be added."""
    fill(path, "a", "b")
    whole = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        with closing(AnswerLog(path, SETTINGS)) as log:
            assert len(log) == sum(end <= length for end in ends[1:])
            log["c"] = reply("to c")
        with closing(AnswerLog(path, SETTINGS)) as log:
            assert log["c"] == reply("to c")
            assert ("a" in log) == (length >= ends[1])


def test_an_empty_log_leaves_no_file(path: Path) -> None:
    fill(path)
    assert not path.exists()
    fill(path, "a")
    with closing(AnswerLog(path, SETTINGS)) as log:
        log.remove()
    assert not path.exists()


def test_work_under_other_settings_is_not_mixed_in(path: Path) -> None:
    fill(path, "a")
    with pytest.raises(ConfigError, match=r"another regeneration \(max_new_tokens=4, now 5\); give its settings"):
        AnswerLog(path, SETTINGS | {"max_new_tokens": 5})
    path.write_bytes(b"what is this\n")
    with pytest.raises(ConfigError, match=r"target=None, now 'tiny'"):
        AnswerLog(path, SETTINGS)


def test_the_settings_of_unfinished_work_can_be_read(path: Path) -> None:
    out = path.with_name("out.jsonl")
    assert settings_of(out) == {}
    fill(path, "a")
    assert settings_of(out) == SETTINGS
    path.write_bytes(b"\xff\n")
    assert settings_of(out) == {}


def test_a_damaged_log_is_said_to_be(path: Path) -> None:
    fill(path, "a", "b")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + b"\0" * 8 + b"\n" + lines[2])
    with pytest.raises(ConfigError, match=rf"damaged at byte {len(lines[0] + lines[1])} .* the 1 answers before"):
        AnswerLog(path, SETTINGS)


def test_two_processes_do_not_write_one_file(path: Path) -> None:
    with closing(AnswerLog(path, SETTINGS)), pytest.raises(ConfigError, match="being written by another process"):
        AnswerLog(path, SETTINGS)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write '.*file/out.partial'.*writable folder"):
        AnswerLog(tmp_path / "file" / "out.partial", SETTINGS)
