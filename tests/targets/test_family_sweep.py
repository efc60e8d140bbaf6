"""Causal LMs of transformers at tiny size: each is served exactly, or refused in a sentence that names a way out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from causal_lms import MOST_ERROR, Outcome, names, outcome, row

DOCS = Path(__file__).resolve().parents[2] / "docs" / "targets.md"
LIGHT = (
    "llama", "llama-dynamic", "phi3-longrope", "gemma2", "gpt_oss", "gpt2", "bloom", "falcon", "mpt", "codegen",
    "jetmoe", "doge", "recurrent_gemma", "qwen2_5_vl", "mistral3", "bert", "cpmant", "gemma3n_text", "falcon_mamba",
)  # fmt: skip
"""Those that `make test` looks at; the others are `slow`."""


def check(found: Outcome) -> None:
    """That the table has this row, where it was made with these transformers; later ones serve some families better."""
    text = DOCS.read_text()
    (made_with,) = re.findall(r"prints for transformers (\d+\.\d+)", text)
    assert row(found) in text.splitlines() or not transformers.__version__.startswith(f"{made_with}.")


def see(name: str, folder: Path) -> Outcome:
    found = outcome(name, folder)
    if found.how == "none":
        pytest.skip(f"no tiny {name} here: {found.why}")
    if found.how == "refused":
        assert "\n" not in found.why
        assert re.search(r"take another|--backend sglang|--set target", found.why), found.why
    else:
        assert found.error <= MOST_ERROR, found
    return found


@pytest.mark.parametrize("name", LIGHT)
def test_states_are_exact_or_refused_with_a_way_out_as_the_docs_say(name: str, tmp_path: Path) -> None:
    check(see(name, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in names() if name not in LIGHT])
def test_the_other_families_too(name: str, tmp_path: Path) -> None:
    check(see(name, tmp_path))
