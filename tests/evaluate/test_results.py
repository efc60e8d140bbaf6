"""Results of an evaluation: what is a tie, what can be compared, and files that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from specd.errors import CheckpointError
from specd.evaluate.results import EvalFacts, Evaluation, Mismatch, PromptResult, load_facts


@pytest.mark.parametrize(
    ("margin", "got", "tie"), [(0.5, 2, True), (-0.5, 2, True), (0.51, 2, False), (-0.51, 2, False), (0.0, None, False)]
)
def test_a_tie_is_a_margin_within_rounding_between_two_tokens(margin: float, got: int | None, tie: bool) -> None:
    assert Mismatch(prompt=0, position=0, expected=1, got=got, margin=margin, rounding=0.5).tie is tie


def evaluation(**changes: Any) -> EvalFacts:
    rows = (PromptResult(prompt_tokens=4, new_tokens=8, forwards=5, acceptance_length=1.4, identical=True, seconds=1.0,
                         greedy_seconds=2.0),)  # fmt: skip
    misses = (Mismatch(prompt=0, position=1, expected=1, got=2, margin=0.1, rounding=0.5),
              Mismatch(prompt=1, position=0, expected=1, got=2, margin=9.0, rounding=0.5))  # fmt: skip
    result = Evaluation(
        acceptance_length=1.4, acceptance_by_offset=(0.5,), identical=False, mismatches=misses, new_tokens=8,
        forwards=5, tokens_per_s=8.0, greedy_tokens_per_s=4.0, prompts=rows,
    )  # fmt: skip
    facts = EvalFacts(model="m", draft="d", untrained=False, block_size=2, max_new_tokens=8, source="s", result=result)
    return msgspec.structs.replace(facts, **changes)


def test_ties_are_told_from_differences() -> None:
    found = evaluation()
    assert (found.prompts, found.identical, found.ties, found.different) == (1, 1, 1, 1)


def test_figures_of_the_same_texts_under_the_same_limits_can_be_compared() -> None:
    base = evaluation()
    assert evaluation(draft="other", untrained=True).texts == base.texts
    for change in ({"source": "t"}, {"max_new_tokens": 9}, {"dtype": "bfloat16"}, {"model": "n"}, {"block_size": 4}):
        assert evaluation(**change).texts != base.texts


def test_a_file_that_is_none_is_named_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    with pytest.raises(CheckpointError, match=r"cannot read .*eval\.json.*--output of a `specd train`"):
        load_facts(path, EvalFacts)
    path.write_bytes(msgspec.json.encode(evaluation())[:-9])
    with pytest.raises(CheckpointError, match=r"eval\.json is damaged.*delete it and create it again"):
        load_facts(path, EvalFacts)
    path.write_bytes(msgspec.json.encode(evaluation()))
    assert load_facts(path, EvalFacts) == evaluation()
