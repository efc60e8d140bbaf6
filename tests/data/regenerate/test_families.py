"""What a target of any family writes is trained as it was written, its special tokens included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from chats import talk, write_rows
from families import FAMILIES, Family, write_family
from specd.config.settings import DataConfig
from specd.data.regenerate.job import Sampling, regenerate
from specd.data.regenerate.local import Local
from specd.data.samples import Job, Maker
from specd.data.tokenizer import load_tokenizer


class Writer:
    """A target that writes what it is given: one answer to each prompt, in the order of their lengths."""

    device = "cpu"
    generation_config = None
    max_position_embeddings = 4096

    def __init__(self, answers: list[list[int]], ends: list[int]) -> None:
        self.answers = answers
        self.config = self
        self.generation_config = type("Settings", (), {"eos_token_id": ends})

    def get_text_config(self) -> Writer:
        return self

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([self.answers.pop(0)])], 1)


def writings(family: Family, tokenizer: Any) -> list[list[int]]:
    """A plain answer with each end of the family, and one that holds a special token."""
    names = [name for name in (*family.extra, *family.special) if name not in (*family.ends, family.eos, family.bos)]
    texts = [f"Blue.{end}" for end in family.ends]
    texts += [f"{names[0]}final Blue.{family.ends[0]}"] if names else []
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_labels_are_what_was_written(tmp_path: Path, family: Family) -> None:
    directory = write_family(family, tmp_path / family.name)
    tokenizer: Any = load_tokenizer(directory)
    wanted = writings(family, tokenizer)
    target: Any = Writer(list(wanted), [tokenizer.convert_tokens_to_ids(end) for end in family.ends])
    rows = [{"messages": talk("Name a colour." + " Red?" * number)} for number in range(len(wanted))]
    source = write_rows(tmp_path / "in.jsonl", *rows)
    answerer = Local(target, tokenizer, Sampling(), target="w", batch_size=1, date="2026-01-31")
    regenerate(DataConfig(path=source), answerer, tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    maker = Maker(Job(DataConfig(path="out.jsonl", date="2026-01-31"), directory, 1))
    for coded, written in zip(maker.coded([("row", row) for row in found]), wanted, strict=True):
        assert not isinstance(coded, Exception)
        assert coded.tokens[coded.loss_mask].tolist() == written
