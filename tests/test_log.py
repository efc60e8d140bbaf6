"""Lines of all processes in one form."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from specd import log


def record(message: str, *arguments: object, error: bool = False) -> logging.LogRecord:
    try:
        raise ValueError("why")
    except ValueError:
        info = sys.exc_info() if error else None
    made = logging.LogRecord("specd.x", logging.WARNING, "x.py", 1, message, arguments, info)
    made.created, made.msecs = 1_000_000_000.25, 250.0
    return made


def test_text_names_the_process_where_it_is_not_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(log.FORM, raising=False)
    assert log.formatter().format(record("a %d", 3)).endswith(" WARNING specd.x: a 3")
    assert log.formatter("worker").format(record("a")).endswith(" WARNING worker specd.x: a")


def test_json_is_one_line_whatever_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(log.FORM, "json")
    line = log.formatter("worker").format(record('two\nlines and "%s"', "ü", error=True))
    assert "\n" not in line
    said = json.loads(line)
    assert said.pop("pid") > 0
    assert said.pop("traceback").endswith("ValueError: why")
    assert said == {
        "time": "2001-09-09T01:46:40.250Z", "level": "WARNING", "logger": "specd.x", "process": "worker",
        "message": 'two\nlines and "ü"',
    }  # fmt: skip


def test_the_reason_of_an_end_is_found_in_either_form() -> None:
    last = {"level": "ERROR", "logger": "specd", "message": "no such key"}
    for line in ("specd: error: no such key", json.dumps(last)):
        assert log.error_in(line) == "no such key"
    for line in ("", "[1]", "{", json.dumps(last | {"logger": "specd.x"}), json.dumps(last | {"level": "INFO"}), "3"):
        assert log.error_in(line) == ""
