"""`specd data stats`: the counts of a data set add up, and say what is left out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from chats import CHATML, talk, write_rows, write_target
from shown_rows import HELLO, ODD
from specd.cli.main import run

pytestmark = pytest.mark.usefixtures("own_cache")


def stats(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert run(["data", "stats", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def report(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    return json.loads(stats(capsys, *arguments, "--json"))["report"]


def test_samples_tokens_and_labels_are_counted(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"messages": talk("Hi", "Hello. " * i), "form": "odd" if i % 2 else "even"} for i in range(1, 6)]
    path = write_rows(tmp_path / "a.jsonl", *rows, {"messages": talk("Hi")})
    counted = report(capsys, path, "--model", model)
    assert (counted["rows"], counted["samples"], counted["without_labels"]) == (6, 5, 1)
    assert counted["forms"] == {"odd": 3, "even": 2}
    shown = stats(capsys, path, "--model", model)
    assert "form odd" in shown
    assert "█" in shown
    assert f"{counted['tokens']:,}" in shown


def test_samples_may_all_be_alike(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "samples" in stats(capsys, write_rows(tmp_path / "a.jsonl", HELLO), "--model", model)


def test_rows_that_cannot_be_used_stop_it_or_are_counted(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "a.jsonl", HELLO, ODD, HELLO, ODD, {"input_ids": [1, 999]})
    said = stats(capsys, path, "--model", model, code=1)
    assert "3 of 5 rows cannot be used" in said
    assert "data.bad_rows=skip" in said
    skip = path, "--model", model, "--set", "data.bad_rows=skip"
    found = report(capsys, *skip)
    assert [(fault["kind"], fault["rows"]) for fault in found["bad"]] == [
        ("unknown role", 2), ("token beyond the vocabulary", 1),
    ]  # fmt: skip
    assert found["rows"] == found["samples"] + sum(fault["rows"] for fault in found["bad"])
    lines = stats(capsys, *skip).splitlines()
    assert any(line.split()[:2] == ["unusable", "3"] for line in lines)
    assert any(line.startswith("unusable: 2 × unknown role, the first: a.jsonl line 2: ") for line in lines)


def test_each_of_several_sources_is_counted(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_rows(tmp_path / "a.jsonl", HELLO), write_rows(tmp_path / "b.jsonl", HELLO, HELLO)
    asked = first, second, "--model", model, "--set", "data.weights=[1, 0.5]"
    lines = [line.split() for line in stats(capsys, *asked).splitlines()]
    assert ["from", "1", "1", first] in lines
    assert ["from", "2", "2", f"{second},", "weight", "0.5"] in lines
    whole = json.loads(stats(capsys, "--data", first, "--data", second, "--model", model, "--json"))
    assert (whole["data"], whole["report"]["sources"]) == ([first, second], [1, 2])


def test_long_documents_are_counted_in_pieces(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"text": "zq" * 20})
    split = stats(capsys, path, "--model", model, "--set", "data.max_length=16", "--set", "data.long=split")
    assert any(line.split()[:3] == ["split", "2", "samples"] for line in split.splitlines())


def test_what_comes_with_specd_is_counted_where_nothing_names_data(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "specd:demo/train.jsonl" in stats(capsys, "--model", model)


def test_wrong_settings_are_refused_by_name(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "a.jsonl", HELLO)
    assert "max_lenght" in stats(capsys, path, "--model", model, "--set", "data.max_lenght=3", code=2)


def test_an_output_that_knows_ascii_alone_gets_that(
    tmp_path: Path, model: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = write_rows(tmp_path / "ä.jsonl", HELLO, ODD)
    sys.stdout.reconfigure(encoding="ascii")  # type: ignore[union-attr]
    assert run(["data", "stats", path, "--model", str(model), "--set", "bad_rows=skip"]) == 0
    text = capsysbinary.readouterr().out.decode("ascii")
    assert "#" * 40 in text
    assert r"unusable: 1 \xd7 unknown role, the first: \xe4.jsonl line 2" in text


def test_training_reads_what_is_counted_with_each_of_a_tokenizers_templates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The template for tools lies in a folder of its own, and the trainer has the daemon's files alone."""
    from transformers import AutoTokenizer

    target = write_target(tmp_path / "target", num_layers=6)
    tokenizer: Any = AutoTokenizer.from_pretrained(target)
    tools = "{{ tools | length }} tools: {{ tools | tojson }} " + CHATML
    tokenizer.chat_template = {"default": CHATML, "tool_use": tools}
    tokenizer.save_pretrained(target)
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    path = write_rows(tmp_path / "a.jsonl", {**HELLO, "tools": [tool]}, HELLO)
    model = f"{target}/"
    counted = report(capsys, path, "--model", model, "--set", f"data.cache_dir={tmp_path}/a")
    small = ("num_layers=1", "num_taps=2", "block_size=4", "num_anchors=4", "mask_token_id=9")
    settings = [*(f"draft.{one}" for one in small), "data.max_length=512", "data.batch_tokens=512", "train.threads=1"]
    arguments = ["--model", model, "--data", path, "--output", str(tmp_path / "run"), "--max-steps", "1"]
    assert run(["train", "dflash", *arguments, "--device", "cpu", *(f"--set={one}" for one in settings)]) == 0
    trained = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert (trained["tokens"], trained["trainable tokens"]) == (
        f"{counted['tokens']:,}", f"{counted['trainable_tokens']:,}",
    )  # fmt: skip
    assert "1 tools: " in AutoTokenizer.from_pretrained(tmp_path / "run" / "draft").apply_chat_template(
        HELLO["messages"], tools=[tool], tokenize=False
    )
