"""A page of rows: labels in colour or in brackets, cut tokens, ids, and nothing that steers the terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from chats import TRIMMED, data_model, talk, write_rows
from shown_rows import HELLO, shown
from specd.cli.main import run
from specd.cli.page import visible

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Output as to a terminal of colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    return monkeypatch


def test_labels_are_coloured(
    tmp_path: Path, model: Path, terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi", "x")}, HELLO)
    text = shown(capsys, path, "--model", model, "--row", "2")
    assert "\x1b[1;32mHello.<|im_end|>\x1b[0m" in text
    assert "\x1b[2m<|im_start|>system\x1b[0m" in text
    assert "⟦" not in text
    assert "label" in text.splitlines()[-1]


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), ("FORCE_COLOR", "")])
def test_labels_are_in_brackets_where_there_is_no_colour(
    tmp_path: Path, model: Path, terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    terminal.setenv(name, value)
    text = shown(capsys, write_rows(tmp_path / "a.jsonl", HELLO), "--model", model)
    assert "assistant\n⟦Hello.<|im_end|>⟧\n" in text
    assert text.splitlines()[-1] == "⟦label⟧ (the target writes it), context (given)"


def test_through_a_pipe_there_is_no_colour(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, write_rows(tmp_path / "a.jsonl", HELLO), "--model", model)
    assert "⟦Hello.<|im_end|>⟧" in text
    assert "\x1b" not in text


def test_an_output_that_knows_ascii_alone_gets_that(
    tmp_path: Path, model: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"messages": talk("Señor ⟦", "Olé [[x]] " * 30)}
    path = write_rows(tmp_path / "ä.jsonl", row)
    sys.stdout.reconfigure(encoding="ascii")  # type: ignore[union-attr]
    assert run(["data", "show", path, "--model", str(model), "--set", "data.max_length=60"]) == 0
    text = capsysbinary.readouterr().out.decode("ascii")
    assert "Se\\xf1or \\u27e6<|im_end|>" in text
    assert "[[Ol\\xe9 \\[[x\\]]" in text
    assert "]]<cut>" in text
    assert "\\[[ \\]] (they stand in the text)" in text.splitlines()[-1]
    assert "\\xe4.jsonl line 1 ---" in text


def test_brackets_of_the_text_itself_can_be_told_apart(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, write_rows(tmp_path / "a.jsonl", {"messages": talk("⟦a⟧", "⟦b⟧")}), "--model", model)
    assert "user\n\\⟦a\\⟧<|im_end|>" in text
    assert "⟦\\⟦b\\⟧<|im_end|>⟧" in text
    assert text.endswith(", \\⟦ \\⟧ (they stand in the text)\n")


def test_a_row_cannot_steer_the_terminal(
    tmp_path: Path, model: Path, terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"messages": talk("a\x1b]0;title\x07", "b\x9b31m\u202e")}, {"messages": [{"role": "\x1b[2J", "content": ""}]}
    text = shown(capsys, write_rows(tmp_path / "a.jsonl", *rows), "--model", model, "--row", "1-2", code=1)
    assert r"a\x1b]0;title\x07" in text
    assert r"b\x9b31m\u202e" in text
    assert "\x1b[2J" not in text
    assert visible("tab\t and\nline", "utf-8") == "tab\t and\nline"


def test_what_is_cut_is_marked_and_counted(
    tmp_path: Path, model: Path, terminal: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi", "Hello. " * 9)})
    arguments = path, "--model", model, "--set", "data.max_length=50"
    assert "\x1b[2;9;31m" in shown(capsys, *arguments)
    terminal.delenv("FORCE_COLOR")
    text = shown(capsys, *arguments)
    assert "⟧✂" in text
    assert "⟦" not in text.partition("✂")[2].partition("─")[0]
    assert "50 tokens, " in text
    assert " tokens cut\n" in text
    assert text.endswith(", ✂ (beyond data.max_length=50)\n")


def test_a_long_document_is_cut_or_split(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"text": "zq" * 20})
    arguments = path, "--model", model, "--set", "data.max_length=16"
    assert "16 tokens, 16 labels, 24 tokens cut" in shown(capsys, *arguments)
    assert "40 tokens, 40 labels, split into 3 samples" in shown(capsys, *arguments, "--set", "data.long=split")


def test_thoughts_that_the_template_drops_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from chats import THINKING

    model = data_model(tmp_path / "model", THINKING)
    thought = "<think>\nHm.\n</think>\n\nOne."
    path = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi", thought, "And?", "Two.")})
    assert "the chat template leaves out a part of 1 answer," in shown(capsys, path, "--model", model)


def test_each_token_has_a_line_of_its_id_and_text(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = write_rows(tmp_path / "a.jsonl", {"messages": talk("H\ti", "é x")})
    arguments = path, "--model", model, "--ids", "--set", "data.max_length=23"
    lines = shown(capsys, *arguments).splitlines()
    assert lines[1].split() == ["place", "id", "text"]
    assert lines[2].split() == ["0", "1", "'<|im_start|>'"]
    assert any(line.split()[2:] == [r"'\t'"] for line in lines)
    assert [line.split()[2:] for line in lines[21:23]] == [["label", "Ã"], ["label", "©"]]
    assert any(line.endswith(" label ' '") for line in lines)
    assert sum(" cut   '" in line for line in lines) == 2
    assert max(map(len, lines)) <= 80
    assert not any("⟦" in line for line in lines)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert any("\x1b[1;32m" in line and " label " in line for line in shown(capsys, *arguments).splitlines())


def test_a_space_at_which_labels_begin_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some tokenizers drop the space with which a text begins when it is decoded by itself."""
    import json

    model = data_model(tmp_path / "model", TRIMMED)
    file = model / "tokenizer.json"
    core = json.loads(file.read_text())
    core["decoder"] = {
        "type": "Sequence",
        "decoders": [core["decoder"], {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    }
    file.write_text(json.dumps(core))
    text = shown(capsys, write_rows(tmp_path / "a.jsonl", HELLO), "--model", model)
    assert "[assistant]⟦ Hello. <|im_end|>⟧" in text
