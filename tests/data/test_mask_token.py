"""The mask token is one that neither texts nor the target have, or there is a reason said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chats import CHATML, write_base, write_rows, write_tokenizer
from specd.config.settings import DataConfig
from specd.data.dataset import Dataset, prepare
from specd.data.mask_token import _RESERVED, candidates, check_absent, check_unwritten, choose
from specd.data.samples import vocabulary
from specd.data.tokenizer import load_tokenizer
from specd.errors import ConfigError


def number(directory: Path, token: str) -> int:
    found = load_tokenizer(directory).convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def dataset(tmp_path: Path, directory: Path, *ids: int) -> Dataset:
    path = write_rows(
        tmp_path / "ids.jsonl",
        {"input_ids": [7, 7], "loss_mask": [1, 1]},
        {"input_ids": ids, "loss_mask": [1] * len(ids)},
    )
    return prepare(DataConfig(path=path, cache_dir=str(tmp_path / "cache")), directory)


def test_rows_of_the_embedding_behind_the_tokenizer_come_first(tmp_path: Path) -> None:
    base = write_base(tmp_path, padded=3, reserved=2)
    size = vocabulary(base)
    found = candidates(base, size, "mine")
    assert [one.id for one in found] == [size - 3, size - 2, size - 1, size - 5, size - 4]
    assert "3 rows more than its tokenizer has tokens" in found[0].reason
    assert "reserves it as '<|reserved_0|>'" in found[3].reason


@pytest.mark.parametrize("padded", [0, -1])
def test_else_a_reserved_token_that_the_embedding_has(tmp_path: Path, padded: int) -> None:
    base = write_base(tmp_path, padded=padded, reserved=2)
    first = number(base, "<|reserved_0|>")
    assert [one.id for one in candidates(base, vocabulary(base), "mine")] == [first, first + 1][: 2 + padded]


def test_a_reserved_token_that_is_used_is_none(tmp_path: Path) -> None:
    base = write_base(tmp_path, reserved=3)
    first = number(base, "<|reserved_0|>")
    (base / "chat_template.jinja").write_text(CHATML.replace("<|im_start|>", "<|reserved_0|>"))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, first + 2]}))
    assert [one.id for one in candidates(base, vocabulary(base), "mine")] == [first + 1]


@pytest.mark.parametrize("known", [True, False])
def test_without_any_it_has_to_be_given(tmp_path: Path, known: bool) -> None:
    if known:
        write_tokenizer(tmp_path)
    size = len(load_tokenizer(tmp_path)) if known else 256
    with pytest.raises(ConfigError, match=r"no mask token is known for target 'mine'.*mask_token_id=ID.*--preset NAME"):
        candidates(tmp_path, size, "mine")


@pytest.mark.parametrize(
    ("token", "reserved"),
    [
        ("<|reserved_special_token_17|>", True),
        ("<|reserved_200013|>", True),
        ("<unused0>", True),
        ("[unused12]", True),
        ("<extra_id_3>", True),
        ("<|extra_0|>", True),
        ("<SPECIAL_20>", True),
        ("[control_8]", True),
        ("<|dummy_7|>", True),
        ("<|placeholder1|>", True),
        ("<｜place▁holder▁no▁5｜>", True),
        ("<|im_start|>", False),
        ("<think>", False),
        ("<|finetune_right_pad_id|>", False),
        ("<0x0A>", False),
        ("[TOOL_CALLS]", False),
        ("reserved_1", False),
    ],
)
def test_names_of_reserved_tokens(token: str, reserved: bool) -> None:
    assert (_RESERVED.fullmatch(token) is not None) == reserved


def test_the_one_that_is_chosen_is_not_in_the_data(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", padded=2)
    size = vocabulary(base)
    found = candidates(base, size, "mine")
    assert choose(found, dataset(tmp_path, base, 5, 6)).id == size - 2
    assert choose(found, dataset(tmp_path, base, 5, size - 2)).id == size - 1
    with pytest.raises(ConfigError, match=r"each of the 2 .* occurs in the data"):
        choose(found, dataset(tmp_path, base, size - 1, size - 2))


def test_one_that_is_in_the_data_is_refused_with_its_row(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    found = dataset(tmp_path, base, 5, 9, 9)
    check_absent(8, found)
    with pytest.raises(ConfigError, match=r"mask_token_id=9: the data has this token 2 times, first in row 2; give"):
        check_absent(9, found)


def test_one_that_the_target_writes_is_refused_with_the_reason(tmp_path: Path) -> None:
    chat = write_tokenizer(write_base(tmp_path, padded=1))
    (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    (chat / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 8}}))
    for token, reason in (
        (number(chat, "<|im_end|>"), r"eos_token, '<\|im_end\|>'"),
        (number(chat, "<|im_start|>"), r"the chat template writes this token, '<\|im_start\|>'"),
        (7, r"as its generation_config\.json says"),
        (8, r"as its config\.json says"),
    ):
        with pytest.raises(ConfigError, match=rf"draft\.mask_token_id={token}: .*{reason}.*-1 and one is chosen"):
            check_unwritten(token, chat)
    check_unwritten(number(chat, "<|endoftext|>"), chat)  # it pads, and is never written
    check_unwritten(9, tmp_path / "none")
