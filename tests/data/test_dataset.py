"""Prepared data holds every usable row once, counts the others, and is kept for the next run."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from chats import CHATML, THINKING, talk, write_base, write_rows, write_tokenizer
from specd.config.settings import DataConfig
from specd.data.batching import Loader
from specd.data.dataset import Dataset, dated, prepare, sample
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


def bad_file(path: Path, count: int = 200) -> tuple[str, int]:
    """A file with one bad row in ten, of two kinds, and the number of them."""
    rows = []
    for number in range(count):
        row: dict[str, Any] = {"messages": talk("Hi", f"Hello {number}.")}
        if number % 10 == 3:
            row = {"messages": []} if number % 20 == 3 else {"messages": [{"role": "robot", "content": "Hi"}]}
        rows.append(row)
    return write_rows(path, *rows), count // 10


def test_bad_rows_stop_it_once_all_are_counted(tmp_path: Path, tokenizer: Path) -> None:
    path, bad = bad_file(tmp_path / "a.jsonl")
    Path(path).write_text(Path(path).read_text() + "no JSON\n")
    for _ in range(2):  # prepared, and from the cache
        with pytest.raises(DataError) as error:
            prepare(DataConfig(path=path), tokenizer)
        said = str(error.value).splitlines()
        assert f"{bad + 1} of 201 rows cannot be used" in said[0]
        assert [line.split(" × ")[0].strip() for line in said[1:4]] == ["10", "10", "1"]
        assert "the first: a.jsonl line 4: " in said[1]
        assert "the first: a.jsonl line 14: turn 1 has role 'robot'" in said[2]
        assert "the first: a.jsonl line 201: " in said[3]
        assert "data.bad_rows=skip" in said[-1]


def test_bad_rows_are_skipped_and_counted(
    tmp_path: Path, tokenizer: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, bad = bad_file(tmp_path / "a.jsonl")
    with caplog.at_level(logging.WARNING):
        dataset = prepare(DataConfig(path=path, bad_rows="skip"), tokenizer)
    report = dataset.report
    assert report.rows == 200 == report.samples - report.split + report.without_labels + report.num_bad
    assert report.num_bad == bad
    assert dataset.rows.tolist() == [number for number in range(200) if number % 10 != 3]
    assert "10 rows are left out: unknown role, the first: a.jsonl line 14: turn 1 has role 'robot'" in caplog.text
    with pytest.raises(DataError, match=f"{bad} of 200 rows cannot be used"):
        prepare(DataConfig(path=path), tokenizer)
    assert len([*cache.iterdir()]) == 1, "which are skipped changes no sample"


MEMORY = """
import resource, sys
from pathlib import Path
from specd.config.settings import DataConfig
from specd.data.dataset import prepare
path, tokenizer, cache, rows = sys.argv[1:]
config = DataConfig(path=path, cache_dir=cache, bad_rows="skip", processes=1, max_samples=int(rows))
report = prepare(config, Path(tokenizer)).report
kept = report.samples, report.without_labels, report.num_bad
print(*kept, report.rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_hundred_thousand_rows_take_no_more_memory_than_a_tenth_of_them(tmp_path: Path) -> None:
    """Kept in memory, each of them would take some hundred bytes."""
    tokenizer = write_base(tmp_path / "base")
    good = json.dumps({"input_ids": [5] * 50, "loss_mask": [0] * 20 + [1] * 30})
    bad = [json.dumps({"input_ids": [-1]}), "{"]
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(100_000):
            file.write((bad[number // 100 % 2] if number % 100 == 99 else good) + "\n")
    peaks = []
    for rows in (10_000, 100_000):
        command = [sys.executable, "-P", "-W", "ignore", "-c", MEMORY, str(tmp_path / "a.jsonl"), str(tokenizer)]
        done = subprocess.run(
            [*command, str(tmp_path / "cache"), str(rows)], capture_output=True, text=True, check=True, timeout=250
        )
        *counts, read, peak = map(int, done.stdout.split())
        assert counts == [rows * 99 // 100, 0, rows // 100]
        assert sum(counts) == read == rows
        peaks.append(peak / 1024)
    assert peaks[1] - peaks[0] < 10, f"{peaks} MB"


def test_nothing_but_bad_rows(tmp_path: Path, tokenizer: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": []}, {"messages": []})
    with pytest.raises(DataError, match="2 of 2 rows cannot be used"):
        prepare(DataConfig(path=path), tokenizer)
    with pytest.raises(DataError, match=r"none of the 2 rows .*; 2 rows: .*, the first: a\.jsonl line 1"):
        prepare(DataConfig(path=path, bad_rows="skip"), tokenizer)


def test_several_files_with_weights(tmp_path: Path, tokenizer: Path) -> None:
    paths = tuple(
        write_rows(tmp_path / f"{name}.jsonl", *({"messages": talk("Hi", f"{name} {i}.")} for i in range(count)))
        for name, count in (("a", 70), ("b", 30), ("c", 50))
    )
    config = DataConfig(path=paths, weights=(2, 0.5, 1), batch_tokens=200, max_length=200)
    dataset = prepare(config, tokenizer)
    assert dataset.report.sources == (70, 30, 50)
    assert dataset.weights is not None
    assert dataset.weights.tolist() == [2] * 70 + [0.5] * 30 + [1] * 50
    assert text_of(dataset, 70, tokenizer)[1] == "b 0.<|im_end|>"
    epochs = [[i for batch in dataset.plan(config, 0).epoch(epoch) for i in batch] for epoch in range(2)]
    counts = np.bincount([i for epoch in epochs for i in epoch])
    assert counts.tolist() == [4] * 70 + [1] * 30 + [2] * 50
    digests = {dataset.digest}
    for weights in ((), (1, 1, 1), (1, 0.5, 1)):
        digests.add(prepare(replace(config, weights=weights), tokenizer).digest)
    assert len(digests) == 3
    with pytest.raises(ConfigError, match=r"data\.weights has 2 numbers and data\.path 3 paths"):
        prepare(replace(config, weights=(1, 2)), tokenizer)


def test_max_samples_counts_through_several_files(tmp_path: Path, tokenizer: Path) -> None:
    paths = tuple(
        write_rows(tmp_path / f"{name}.jsonl", *({"messages": talk("Hi", f"{name} {i}.")} for i in range(5)))
        for name in "abc"
    )
    dataset = prepare(DataConfig(path=paths, weights=(1, 1, 3), max_samples=7), tokenizer)
    assert dataset.report.sources == (5, 2)
    assert len(dataset) == 7
    assert dataset.weights is not None
    assert dataset.weights.tolist() == [1] * 7


def test_samples_of_a_split_document_name_its_row(tmp_path: Path, tokenizer: Path) -> None:
    rows = ({"messages": talk("Hi", "Hello.")}, {"text": "Once upon a time. " * 30}, {"messages": talk("Hi", "Ho.")})
    dataset = prepare(DataConfig(path=write_rows(tmp_path / "a.jsonl", *rows), max_length=40, long="split"), tokenizer)
    assert dataset.report.split > 1
    assert dataset.rows.tolist() == [0, *[1] * (dataset.report.split + 1), 2]
    joined = np.concatenate([dataset.tokens(i) for i in range(1, len(dataset) - 1)])
    assert load_tokenizer(tokenizer).decode(joined.tolist()) == rows[1]["text"]


DATED = CHATML.replace("Be brief.", "Today is ' + strftime_now('%d %B %Y') + '.")


def test_a_template_that_asks_for_the_date(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = write_tokenizer(tmp_path / "dated", DATED)
    config = DataConfig(path=write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi", "Hello.")}))
    with caplog.at_level(logging.WARNING):
        today = dated(config, tokenizer)
    assert today.date == date.today().isoformat()
    assert f"it is told {today.date}" in caplog.text
    assert prepare(config, tokenizer).digest == prepare(today, tokenizer).digest
    other = replace(config, date="2026-01-02")
    assert dated(other, tokenizer) == other
    assert "Today is 02 January 2026." in text_of(prepare(other, tokenizer), 0, tokenizer)[0]
    plain = write_tokenizer(tmp_path / "plain")
    monkeypatch.setattr("specd.data.dataset.Maker", lambda *_: pytest.fail("the tokenizer is read"))
    assert dated(config, plain) == config


def test_a_date_is_no_part_of_data_that_has_none(tmp_path: Path, tokenizer: Path) -> None:
    config = DataConfig(path=write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi", "Hello.")}))
    assert prepare(replace(config, date="2026-01-02"), tokenizer).digest == prepare(config, tokenizer).digest


def test_a_token_is_found_with_its_row(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specd.data.dataset._SCAN", 3)
    rows = [{"input_ids": ids, "loss_mask": [1] * len(ids)} for ids in ([5, 6], [5, 9, 9, 5], [9])]
    dataset = prepare(DataConfig(path=write_rows(tmp_path / "a.jsonl", *rows)), tokenizer)
    assert [dataset.find(token) for token in (5, 6, 9, 7)] == [(3, 0), (1, 0), (3, 1), (0, 0)]


def test_an_asked_format_is_enforced(tmp_path: Path, tokenizer: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi", "Hello."), "text": "Once upon a time"})
    as_text = prepare(DataConfig(path=path, format="text"), tokenizer)
    assert text_of(as_text, 0, tokenizer) == ("Once upon a time",) * 2
    with pytest.raises(DataError, match=r"1 of 1 rows cannot be used.*\n.*data\.format=tokens"):
        prepare(DataConfig(path=path, format="tokens"), tokenizer)


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
