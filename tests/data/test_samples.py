"""Rows become samples within max_length, all of them accounted for, for chat models and for base models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chats import talk, write_base, write_tokenizer
from specd.config.settings import DataConfig
from specd.data.faults import RowError
from specd.data.samples import Coded, Job, Maker, pieces, trainable, vocabulary
from specd.errors import DataError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def maker(directory: Path, needed: int = 1, **settings: Any) -> Maker:
    return Maker(Job(DataConfig(**settings), directory, needed))


def rows(*found: dict[str, Any]) -> list[tuple[str, dict[str, Any] | RowError]]:
    return [(f"line {number}", row) for number, row in enumerate(found, start=1)]


def coded(directory: Path, row: dict[str, Any], **settings: Any) -> Coded:
    (found,) = maker(directory, **settings).coded(rows(row))
    assert isinstance(found, Coded), found
    return found


@pytest.mark.parametrize(
    ("mask", "run"), [([1, 0, 1], 1), ([1, 1, 0, 1], 2), ([0, 1, 1, 1, 0], 3), ([0, 0], 0), ([], 0), ([1] * 5, 5)]
)
def test_a_sample_needs_as_many_labels_in_a_row_as_its_draft(mask: list[int], run: int) -> None:
    found = [trainable(np.array(mask, np.bool_), needed) for needed in range(1, 7)]
    assert found == [needed <= run for needed in range(1, 7)]


@given(st.integers(0, 200), st.integers(4, 30), st.integers(1, 2))
def test_pieces_are_all_of_a_document_none_too_long_and_none_too_short(size: int, most: int, least: int) -> None:
    found = pieces(size, most, least)
    assert [place for start, end in found for place in range(start, end)] == [*range(size)]
    assert all(end - start <= most for start, end in found)
    assert len(found) == -(-size // most)
    assert all(end - start >= least for start, end in found) or size < least


@given(st.integers(0, 50), st.integers(2, 6), st.integers(1, 9))
def test_no_piece_is_longer_than_it_may_be_whatever_a_draft_needs(size: int, most: int, least: int) -> None:
    assert all(end - start <= most for start, end in pieces(size, most, least))


def test_conversations_among_the_documents_of_a_base_model_are_left_out_where_bad_rows_are(base: Path) -> None:
    found = maker(base, bad_rows="skip").make(rows({"text": "Once upon"}, {"prompt": "2 +", "completion": " 2"}))
    assert found.report.samples == 1
    assert [(fault.kind, fault.rows) for fault in found.report.bad] == [("no chat template", 1)]


def test_a_long_document_is_cut_or_split_and_no_token_lost(base: Path) -> None:
    row = {"text": "Once upon a time there was a tone. " * 9}
    whole = coded(base, row)
    assert whole.document
    for size in range(12, 60, 5):
        portion = maker(base, 2, long="split", max_length=size).make(rows(row, row))
        assert portion.tokens.tolist() == whole.tokens.tolist() * 2
        assert portion.loss_mask.tolist() == whole.loss_mask.tolist() * 2
        assert portion.lengths.max() <= size
        report = portion.report
        assert portion.rows.tolist() == [0] * (report.samples // 2) + [1] * (report.samples // 2)
        assert (report.rows, report.split, report.cut) == (2, report.samples - 2, 0)
    cut = maker(base, long="cut", max_length=20).make(rows(row))
    assert cut.tokens.tolist() == whole.tokens[:20].tolist()
    assert (cut.report.samples, cut.report.split, cut.report.cut) == (1, 0, 1)


def test_only_documents_are_split(tmp_path: Path) -> None:
    chat = write_tokenizer(tmp_path)
    ids = [5, 6, 7, 8] * 10
    made = maker(chat, long="split", max_length=30)
    assert made.make(rows({"messages": talk("Hi", "Hello. " * 30)})).report.samples == 1
    assert made.make(rows({"input_ids": ids, "loss_mask": [0] + [1] * 39})).report.samples == 1
    assert made.make(rows({"input_ids": ids, "loss_mask": [1] * 40})).lengths.tolist() == [30, 10]


@pytest.mark.parametrize("text", ["Once upon a time", "<|begin|>Once upon a time"])
def test_a_base_model_reads_documents_with_one_bos(base: Path, text: str) -> None:
    tokens, mask, document, *_ = coded(base, {"text": text})
    assert (tokens[0], tokens.tolist().count(tokens[0])) == (maker(base).encoder.tokenizer.bos_token_id, 1)
    assert mask.tolist() == [False] + [True] * (tokens.size - 1)
    assert document


def test_a_base_model_reads_tokens_but_no_conversations(base: Path) -> None:
    assert coded(base, {"input_ids": [1, 2], "loss_mask": [0, 1]}).tokens.tolist() == [1, 2]
    with pytest.raises(DataError, match=r"no chat template"):
        maker(base).make(rows({"messages": talk("Hi", "Hello.")}))


def test_a_document_that_begins_with_bos_is_one_for_a_chat_model_too(tmp_path: Path) -> None:
    chat = write_tokenizer(write_base(tmp_path))
    settings = json.loads((chat / "tokenizer_config.json").read_bytes()) | {"bos_token": "<|endoftext|>"}
    (chat / "tokenizer_config.json").write_text(json.dumps(settings))
    tokens, mask, document, *_ = coded(chat, {"text": "<|endoftext|>Once upon a time"})
    assert document
    assert mask.tolist() == [False] + [True] * (tokens.size - 1)
    answer = coded(chat, {"text": "<|endoftext|><|im_start|>assistant\nHo.<|im_end|>\n"})
    assert not answer.document
    assert maker(chat).encoder.tokenizer.decode(answer.tokens[answer.loss_mask].tolist()) == "Ho.<|im_end|>"


def test_a_token_beyond_the_embedding_is_its_rows_fault(tmp_path: Path) -> None:
    short = write_base(tmp_path, padded=-1, reserved=2)
    size = vocabulary(short)
    portion = maker(short).make(
        rows(
            {"text": "the <|reserved_0|> is known"},
            {"text": "the <|reserved_1|> is not"},
            {"input_ids": [size - 1, size], "loss_mask": [1, 1]},
            {"text": "Once"},
        )
    )
    assert portion.rows.tolist() == [0, 3]
    (fault,) = portion.report.bad
    assert (fault.kind, fault.rows) == ("token beyond the vocabulary", 2)
    assert f"line 2: its text has the token '<|reserved_1|>', which the tokenizer numbers {size}" in fault.first


def test_rows_add_up(tmp_path: Path) -> None:
    portion = maker(write_tokenizer(tmp_path), 2, max_length=40, long="split", bad_rows="skip").make(
        [
            *rows(
                {"messages": talk("Hi", "Hello."), "form": "greeting"},
                {"messages": talk("Hi")},
                {"messages": []},
                {"messages": [{"role": "robot", "content": "Hi"}]},
                {"text": "Once upon a time. " * 20, "form": "story"},
            ),
            ("line 6", RowError("line 6", "no JSON", "is not JSON")),
            ("line 7", {"messages": talk("Hi", "Hello. " * 30)}),
        ]
    )
    report = portion.report
    assert report.rows == 7 == report.samples - report.split + report.without_labels + report.num_bad
    assert (report.without_labels, report.num_bad, report.cut) == (1, 3, 1)
    assert {fault.first.partition(":")[0] for fault in report.bad} == {"line 3", "line 4", "line 6"}
    assert report.forms == {"greeting": 1, "story": 1 + report.split}
    assert report.tokens == portion.tokens.size == portion.lengths.sum()
    assert report.trainable_tokens == portion.loss_mask.sum()


def test_without_a_size_in_config_json_it_is_the_tokenizers(tmp_path: Path) -> None:
    chat = write_tokenizer(tmp_path)
    assert vocabulary(chat) == 0
    assert maker(chat).vocabulary == maker(chat).encoder.size
    (chat / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 77}}))
    assert vocabulary(chat) == maker(chat).vocabulary == 77
