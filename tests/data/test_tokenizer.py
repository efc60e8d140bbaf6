"""Texts become the target's own tokens, and labels those that begin in a span."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chats import talk, write_base, write_tokenizer
from specd.data.chat import Chat, Rendered, document
from specd.data.forms import conversation
from specd.data.tokenizer import Encoder, _labels, end_tokens, ends_of, load_tokenizer
from specd.errors import DataError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_base(tmp_path_factory.mktemp("base")))


def test_the_ids_are_the_tokenizers_own(tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(write_tokenizer(tmp_path))
    row = {"messages": talk("Hi", "Hello  there.\n\n")}
    rendered = Chat(tokenizer).conversation(conversation(row, "row 1"), "row 1")
    ((tokens, mask),) = Encoder(tokenizer).encode([rendered])
    assert (tokens.dtype.name, mask.dtype.name) == ("int32", "bool")
    assert tokens.tolist() == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]


def test_whitespace_is_a_label_though_the_core_trims_offsets(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer: Any = load_tokenizer(write_tokenizer(tmp_path))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    text = "Hi: Hello.\n<|im_end|>"
    ((tokens, mask),) = Encoder(tokenizer).encode([Rendered(text=text, spans=((3, len(text)),))])
    assert tokenizer.decode(tokens[mask].tolist()) == " Hello.\n<|im_end|>"


@given(
    st.lists(st.integers(0, 30), max_size=20).map(sorted),
    st.lists(st.integers(0, 30), max_size=8, unique=True).map(sorted),
)
def test_a_token_is_a_label_when_it_begins_in_a_span(begins: list[int], edges: list[int]) -> None:
    spans = list(zip(edges[::2], edges[1::2], strict=False))
    wanted = [any(start <= begin < end for start, end in spans) for begin in begins]
    assert _labels(np.array(begins, np.int64), spans).tolist() == wanted


@pytest.mark.parametrize("text", ["Once upon a time", "<|begin|>Once upon a time"])
def test_a_document_has_one_bos_that_is_no_label(base: Any, text: str) -> None:
    begin = len(text.removesuffix("Once upon a time"))
    spans = ((begin, len(text)),)
    ((tokens, mask),) = Encoder(base).encode([Rendered(text=text, spans=spans, document=True)])
    assert tokens.tolist() == base("Once upon a time")["input_ids"]
    assert tokens.tolist().count(base.bos_token_id) == 1
    assert mask.tolist() == [False] + [True] * (tokens.size - 1)


def test_what_went_through_a_template_gets_no_bos(base: Any) -> None:
    text = "Once upon a time"
    found = [tokens.tolist() for tokens, _ in Encoder(base).encode([Rendered(text=text, spans=()), document(text)])]
    assert found[1] == [base.bos_token_id, *found[0]]


def test_a_document_of_the_same_token_twice_keeps_it(tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(write_tokenizer(tmp_path))
    ((tokens, mask),) = Encoder(tokenizer).encode([document("~~")])
    assert tokens.size == 2
    assert mask.all()


def test_where_there_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_text_ends_at_the_tokens_of_the_tokenizer_and_of_the_generation_config(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    class Configured:
        def __init__(self, ids: Any) -> None:
            self.generation_config = GenerationConfig(eos_token_id=ids)  # type: ignore[no-untyped-call]

    tokenizer: Any = load_tokenizer(write_tokenizer(tmp_path))
    own = tokenizer.eos_token_id
    models: list[tuple[Any, list[int]]] = [(None, [own]), (own, [own]), (7, [own, 7]), ([7, own, 8], [own, 7, 8])]
    for ids, ends in models:
        model: Any = Configured(ids)
        assert end_tokens(model, tokenizer) == ends
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert ends_of(tmp_path) == ends
    tokenizer.eos_token = None
    unending: Any = Configured(None)
    with pytest.raises(DataError, match="no end-of-sequence token"):
        end_tokens(unending, tokenizer)
