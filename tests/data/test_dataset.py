"""Prepared data holds every usable row once, counts the others, and is kept for the next run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chats import THINKING, talk, write_rows, write_tokenizer
from specd.config.settings import DataConfig
from specd.data.batching import Loader
from specd.data.dataset import Dataset, prepare, sample, trainable
from specd.data.tokenizer import load_tokenizer
from specd.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def text_of(dataset: Dataset, i: int, tokenizer: Path) -> tuple[str, str]:
    """Sample i as text, and what of it is under the loss mask."""
    known = load_tokenizer(tokenizer)
    tokens, mask = dataset.tokens(i), dataset.loss_mask(i)
    return str(known.decode(tokens.tolist())), str(known.decode(tokens[mask].tolist()))


def test_rows_of_every_kind(tmp_path: Path, tokenizer: Path) -> None:
    ids = load_tokenizer(tokenizer)("abc def", add_special_tokens=False)["input_ids"]
    path = write_rows(
        tmp_path / "mixed.jsonl",
        {"messages": talk("Hi", "Hello."), "form": "greeting", "id": 7},
        {"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo.<|im_end|>\n"},
        {"input_ids": ids, "loss_mask": [0] + [1] * (len(ids) - 1)},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hey."}], "form": "greeting"},
    )
    dataset = prepare(DataConfig(path=path), tokenizer)
    assert [text_of(dataset, i, tokenizer)[1] for i in (0, 1, 3)] == [
        "Hello.<|im_end|>",
        "Ho.<|im_end|>",
        "Hey.<|im_end|>",
    ]
    assert dataset.tokens(2).tolist() == ids
    assert dataset.loss_mask(2).tolist() == [False] + [True] * (len(ids) - 1)
    assert dataset.lengths.tolist() == [dataset.tokens(i).size for i in range(4)]
    report = dataset.report
    assert (report.rows, report.samples, report.cut, report.without_labels) == (4, 4, 0, 0)
    assert report.tokens == dataset.lengths.sum()
    assert report.trainable_tokens == sum(int(dataset.loss_mask(i).sum()) for i in range(4))
    assert report.forms == {"greeting": 2}


def test_rows_without_labels_are_counted_and_left_out(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows(
        tmp_path / "a.jsonl",
        {"messages": talk("Hi")},
        {"messages": talk("Hi", "Hello.")},
        {"messages": talk("Hi", "")},  # its end-of-turn token alone has no label after it
        {"messages": talk("Hello? " * 20, "Hello.")},  # cut before the answer
        {"messages": talk("Hi", "Hello. " * 20)},
    )
    with caplog.at_level(logging.INFO):
        dataset = prepare(DataConfig(path=path, max_length=48), tokenizer, consecutive_labels=2)
    assert dataset.rows.tolist() == [1, 4]
    report = dataset.report
    assert (report.rows, report.samples, report.without_labels, report.cut) == (5, 2, 3, 1)
    assert dataset.lengths.max() == 48
    assert "3 rows are left out" in caplog.text
    assert "1 samples are cut to 48 tokens" in caplog.text


def test_nothing_trainable_at_all(tmp_path: Path, tokenizer: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi")})
    with pytest.raises(DataError, match=r"none of the 1 rows of .*a\.jsonl has trainable tokens"):
        prepare(DataConfig(path=path), tokenizer)


def test_last_turn_only_template_options_and_max_samples(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "thinking", THINKING)
    path = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi", "Ho.", "And?", "Fine.")}, {"messages": "broken"})
    config = DataConfig(path=path, last_turn_only=True, max_samples=1, template={"enable_thinking": False})
    dataset = prepare(config, tokenizer)
    assert len(dataset) == 1
    assert text_of(dataset, 0, tokenizer)[1] == "Fine.<|im_end|>"


def test_prepared_data_is_kept_and_found_again(
    tmp_path: Path, tokenizer: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "a.jsonl", *({"messages": talk("Hi", f"Hello {i}.")} for i in range(5)))
    first = prepare(DataConfig(path=path), tokenizer)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr("specd.data.dataset._build", lambda *_: pytest.fail("it is prepared again"))
    moved = write_rows(tmp_path / "b.jsonl", *({"messages": talk("Hi", f"Hello {i}.")} for i in range(5)))
    again = prepare(DataConfig(path=moved, batch_tokens=99), tokenizer)
    assert again.digest == first.digest
    assert again.report == first.report
    for i in range(5):
        assert np.array_equal(again.tokens(i), first.tokens(i))
        assert np.array_equal(again.loss_mask(i), first.loss_mask(i))


def test_other_content_tokenizer_or_options_are_prepared_anew(tmp_path: Path, tokenizer: Path, cache: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi", "Hello. " * 9)})
    other = write_tokenizer(tmp_path / "other", THINKING)
    digests = [
        prepare(DataConfig(path=path), tokenizer).digest,
        prepare(DataConfig(path=path, max_length=30), tokenizer).digest,
        prepare(DataConfig(path=path), other).digest,
        prepare(DataConfig(path=write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi", "Ho.")})), tokenizer).digest,
    ]
    assert len(set(digests)) == len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("damage", ["truncate", "remove", "report"])
def test_a_damaged_cache_is_prepared_again(
    tmp_path: Path, tokenizer: Path, cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    config = DataConfig(path=write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi", "Hello.")}))
    whole = prepare(config, tokenizer).digest
    (place,) = cache.iterdir()
    if damage == "truncate":
        (place / "tokens.npy").write_bytes((place / "tokens.npy").read_bytes()[:-4])
    elif damage == "remove":
        (place / "starts.npy").unlink()
    else:
        (place / "report.json").write_text("{")
    assert prepare(config, tokenizer).digest == whole
    assert "is damaged" in caplog.text
    assert {file.name for file in place.iterdir()} >= {"tokens.npy", "starts.npy", "report.json"}


def test_a_cache_that_cannot_be_written_only_warns(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    path = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi", "Hello.")})
    assert len(prepare(DataConfig(path=path, cache_dir=str(tmp_path / "file")), tokenizer)) == 1
    assert "cannot keep prepared data" in caplog.text


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "Hi", "reply": "Ho"}, r"line 2: has the columns \['question', 'reply'\]; expected "),
        ({"text": 3}, r"line 2: `text` holds a int"),
        ({"input_ids": [1, 2]}, r"line 2: `loss_mask` is missing"),
        (
            {"input_ids": [1, 10**6], "loss_mask": [1, 1]},
            r"line 2: `input_ids` holds 1000000; expected tokens from 0 to 359, as the target has",
        ),
        ({"input_ids": [1, -2], "loss_mask": [1, 1]}, r"line 2: `input_ids` is \[1, -2\]"),
        ({"input_ids": [[1], [2, 3]], "loss_mask": [1, 1]}, r"line 2: `input_ids` is"),
        ({"input_ids": [1, 2**70], "loss_mask": [1, 1]}, r"line 2: `input_ids` is"),
        ({"input_ids": [1.5, 2], "loss_mask": [1, 1]}, r"line 2: `input_ids` is"),
        ({"input_ids": [1, 2], "loss_mask": [1, 2]}, r"line 2: `loss_mask` is \[1, 2\]"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, r"line 2: 2 `input_ids` but 1 in `loss_mask`"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, r"line 2: turn 1 has role 'robot'"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, tokenizer: Path, row: dict[str, Any], said: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi", "Hello.")}, row)
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be used:\n  1 × .*, the first: a\.jsonl " + said):
        prepare(DataConfig(path=path), tokenizer)


def test_an_asked_format_is_enforced(tmp_path: Path, tokenizer: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi", "Hello."), "text": "Once upon a time"})
    as_text = prepare(DataConfig(path=path, format="text"), tokenizer)
    assert text_of(as_text, 0, tokenizer) == ("Once upon a time",) * 2
    with pytest.raises(DataError, match=r"1 of 1 rows cannot be used.*\n.*data\.format=tokens"):
        prepare(DataConfig(path=path, format="tokens"), tokenizer)


@pytest.mark.parametrize(
    ("mask", "run"), [([1, 0, 1], 1), ([1, 1, 0, 1], 2), ([0, 1, 1, 1, 0], 3), ([0, 0], 0), ([], 0), ([1] * 5, 5)]
)
def test_a_sample_needs_as_many_labels_in_a_row_as_its_draft(mask: list[int], run: int) -> None:
    found = [trainable(np.array(mask, np.bool_), needed) for needed in range(1, 7)]
    assert found == [needed <= run for needed in range(1, 7)]


@pytest.mark.parametrize(
    "config", [DataConfig(), DataConfig(path="a", max_length=1), DataConfig(path="a", max_samples=-1)]
)
def test_impossible_settings(config: DataConfig, tokenizer: Path) -> None:
    with pytest.raises((ConfigError, DataError), match=r"data\.(path|max_length|max_samples)"):
        prepare(config, tokenizer)


def test_more_rows_than_a_chunk_keep_their_order(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specd.data.dataset.CHUNK", 4)
    path = write_rows(tmp_path / "a.jsonl", *({"messages": talk("Hi", f"Hello {i}.")} for i in range(11)))
    seen: list[int] = []
    dataset = prepare(DataConfig(path=path), tokenizer, on_rows=seen.append)
    assert [text_of(dataset, i, tokenizer)[1] for i in range(11)] == [f"Hello {i}.<|im_end|>" for i in range(11)]
    assert seen == [4, 8, 11]
    batches = list(Loader(dataset, dataset.plan(DataConfig(batch_tokens=80), seed=1), epochs=2))
    assert sorted(i for batch in batches for i in batch.samples) == sorted([*range(11)] * 2)


def test_one_row_to_look_at(tmp_path: Path, tokenizer: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi", "Hello.")}, {"messages": talk("Hi")})
    assert not sample(DataConfig(path=path), tokenizer, 2)[1].any()
    with pytest.raises(DataError, match="has no row 3; rows count from 1"):
        sample(DataConfig(path=path), tokenizer, 3)
