"""Evaluation of a draft's directory beside a target that is loaded already."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chats import talk, write_rows, write_target
from drafts import save_draft
from specd.drafts import registry
from specd.drafts.backbone.export import draft_config, save_network
from specd.drafts.backbone.network import Backbone
from specd.drafts.backbone.shape import draft_shape
from specd.drafts.dflash.settings import DFlashConfig
from specd.drafts.dflash2.objective import DFLASH2
from specd.drafts.dflash2.settings import DFlash2Config
from specd.errors import CheckpointError, ConfigError
from specd.evaluate.evaluator import evaluate_draft
from specd.targets.transformers.load import load_causal_lm


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target") / "tiny")


@pytest.fixture(scope="module")
def target(directory: Path) -> tuple[Any, Any]:
    return load_causal_lm(str(directory), dtype="float32", device="cpu")


@pytest.fixture
def draft(directory: Path, tmp_path: Path) -> Path:
    """One that was trained from seed 3 without a step."""
    config = DFlashConfig(num_layers=1, block_size=4, mask_token_id=2)
    shape = draft_shape(config, json.loads((directory / "config.json").read_text()), (1, 2))
    save_draft(Backbone(shape, 3), tmp_path / "draft", dtype=torch.float32)
    return tmp_path / "draft"


def test_both_drafts_are_decoded_beside_the_same_texts(
    target: tuple[Any, Any], draft: Path, directory: Path, tmp_path: Path
) -> None:
    prompts = write_rows(tmp_path / "asked.jsonl", *({"messages": talk(f"What is {i}?")} for i in range(3)))
    done: dict[str, int] = {}

    @contextlib.contextmanager
    def count(title: str, total: int) -> Iterator[Callable[[], None]]:
        assert total == 2
        done[title] = 0

        def advance() -> None:
            done[title] += 1

        yield advance

    found = evaluate_draft(draft, *target, prompts, limit=2, max_new_tokens=8, untrained=3, progress=count)
    assert done == {"target alone": 2, "with the untrained draft": 2, "with the trained draft": 2}
    untrained, trained = found["untrained"], found["trained"]
    assert (untrained.untrained, trained.untrained, trained.identical, trained.prompts) == (True, False, 2, 2)
    assert (trained.model, trained.source, trained.dtype) == (str(directory), prompts, "float32")
    times = {"tokens_per_s": 0, "greedy_tokens_per_s": 0, "prompts": ()}
    same = [{**vars_of(facts.result), **times} for facts in (untrained, trained)]
    assert same[0] == same[1], "no step was trained"
    assert [*evaluate_draft(draft, *target, prompts, limit=1, max_new_tokens=4, name="mine")] == ["trained"]


def test_a_draft_is_decoded_as_it_says_and_told_where_its_target_says_otherwise(
    target: tuple[Any, Any], draft: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = write_rows(tmp_path / "asked.jsonl", {"messages": talk("Hi")})
    evaluate_draft(draft, *target, prompts, max_new_tokens=4, embedding_scale=1.003)
    assert not caplog.records
    evaluate_draft(draft, *target, prompts, max_new_tokens=4, embedding_scale=8.0)
    assert (
        "times 1 (input_embedding_scale), which this target multiplies by 8: SGLang gives it the latter" in caplog.text
    )
    table, head = (getattr(target[0], f"get_{name}_embeddings")().weight for name in ("input", "output"))
    config = json.loads((draft / "config.json").read_text())
    guesses = []
    for scale, rows in ((2.0, table), (1.0, 2 * table)):
        config["dflash_config"]["input_embedding_scale"] = scale
        (draft / "config.json").write_text(json.dumps(config))
        drafter = registry.read(draft).drafter(rows, head)
        with torch.inference_mode():
            drafter.extend(torch.arange(5), torch.randn(5, 2 * rows.shape[1], generator=torch.manual_seed(0)))
            guesses.append(drafter.propose(7).tolist())
    assert guesses[0] == guesses[1]


def test_a_run_and_a_path_are_taken_as_they_are(target: tuple[Any, Any], draft: Path, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "asked.jsonl", {"messages": talk("Hi")})
    found = evaluate_draft(draft.parent, *target, Path(prompts), max_new_tokens=4)["trained"]
    assert (found.draft, found.source) == (str(draft), prompts)


@pytest.mark.parametrize(
    ("limit", "lacking", "message"),
    [(-1, False, "limit=-1: expected a number of prompts"), (0, True, "target 'mine' has no tokenizer")],
)
def test_what_cannot_be_decoded_is_refused(
    target: tuple[Any, Any], draft: Path, limit: int, lacking: bool, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate_draft(draft, target[0], None if lacking else target[1], name="mine", limit=limit)


def test_a_draft_is_decoded_without_its_selector(
    target: tuple[Any, Any], draft: Path, directory: Path, tmp_path: Path
) -> None:
    config = DFlash2Config(num_layers=1, block_size=4, mask_token_id=2, selector_rank=4, selector_top_k=9)
    read = json.loads((directory / "config.json").read_text())
    shape = draft_shape(config, read, (1, 2), DFLASH2.shape, DFLASH2.own)
    network = DFLASH2.network(shape, 3)
    with torch.no_grad():
        for parameter in network.get_submodule("candidate_selector").parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    nested = {name: getattr(shape, name) for name in DFLASH2.own}
    described = draft_config(DFLASH2, shape, torch.float32)
    save_network(network, described | nested, tmp_path / "selecting", dtype=torch.float32)
    prompts = write_rows(tmp_path / "asked.jsonl", {"messages": talk("Hi")})
    found = evaluate_draft(tmp_path / "selecting", *target, prompts, max_new_tokens=8, unary=True)
    assert list(found) == ["unary", "trained"]
    assert all(facts.result.identical for facts in found.values())
    with pytest.raises(ConfigError, match=r"guesses each token by itself: .* leave --unary out"):
        evaluate_draft(draft, *target, prompts, max_new_tokens=8, unary=True)


def vars_of(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def test_what_is_no_draft_of_this_target_is_refused(
    target: tuple[Any, Any], draft: Path, directory: Path, tmp_path: Path
) -> None:
    prompts = write_rows(tmp_path / "asked.jsonl", {"messages": talk("Hi")})
    with pytest.raises(CheckpointError, match="is no draft directory"):
        evaluate_draft(directory.parent, *target, prompts)
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(config | {"architectures": ["Eagle9"]}))
    with pytest.raises(ConfigError, match=r"architectures is \['Eagle9'\], expected one of DFlashDraftModel"):
        evaluate_draft(draft, *target, prompts)
    other = json.loads((directory / "config.json").read_text()) | {"vocab_size": 50}
    shape = draft_shape(DFlashConfig(num_layers=1, block_size=4, mask_token_id=2), other, (1, 2))
    save_draft(Backbone(shape, 3), draft, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"vocabulary 50 .*evaluate it with its own target"):
        evaluate_draft(draft, *target, prompts)
    same, depth = json.loads((directory / "config.json").read_text()), target[0].config.num_hidden_layers
    for deep in (depth - 1, depth, depth + 5):  # the last layer's state would be a normed one
        shape = draft_shape(
            DFlashConfig(num_layers=1, block_size=4, mask_token_id=2), same | {"num_hidden_layers": 99}, (1, deep)
        )
        save_draft(Backbone(shape, 3), draft, dtype=torch.float32)
        with pytest.raises(ConfigError, match=rf"is for another target than .*taps \[1, {deep}\] leave the legal"):
            evaluate_draft(draft, *target, prompts)
