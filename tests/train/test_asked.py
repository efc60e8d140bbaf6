"""Settings of a run before its target is known: what they may be given as, and what is seen to be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from specd.config.settings import RunConfig, StatesConfig, SubscriberConfig, TrainConfig
from specd.errors import ConfigError
from specd.train.asked import by_target, check, is_finished, output_of
from specd.train.directory import RunDirectory, RunFacts, write_facts

RUN = RunConfig(method="dflash", train=TrainConfig(device="cpu"))


def test_a_mapping_is_taken_on_top_of_the_recipe_of_its_target(tmp_path: Path) -> None:
    asked = {"method": "dflash", "output": tmp_path / "run", "train": {"lr": 1e-3}}
    settle = by_target(asked)
    assert (settle("").draft, output_of(settle("")).path) == ({}, tmp_path / "run")
    assert settle("smollm2-135m").draft["block_size"] == 8
    assert settle("smollm2-135m").train.lr == 1e-3
    assert by_target(settle) is settle
    assert by_target(RUN)("smollm2-135m") == RUN, "it is the whole"
    assert output_of(RUN).path == Path("runs/dflash")


def test_what_no_target_is_needed_for_is_checked() -> None:
    assert check(RUN) == "cpu"
    with pytest.raises(ConfigError, match=r"subscriber\.transport='pigeon': expected one of auto, "):
        check(msgspec.structs.replace(RUN, subscriber=SubscriberConfig(transport="pigeon")))
    rounded = msgspec.structs.replace(RUN, capture=StatesConfig(dtype="float8_e4m3fn"))
    assert check(rounded) == "cpu"
    with pytest.raises(ConfigError, match=r"subscriber\.borrow=true with states in float8_e4m3fn: .*leave one of them"):
        check(msgspec.structs.replace(rounded, subscriber=SubscriberConfig(borrow=True)))


def test_a_run_is_finished_under_the_settings_that_it_was_made_with(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    settings = {"method": "dflash", "data": {"path": "a.jsonl"}, "draft": {"mask_token_id": 3}}
    first = by_target(settings | {"train": {"dtype": "float32"}})("")
    facts = RunFacts(
        started="", finished="now", target={"model": "t"}, draft={}, data={}, transports={}, machine={},
        config=msgspec.to_builtins(first),
    )  # fmt: skip
    write_facts(tmp_path, facts)
    assert not is_finished(directory, lambda target: first, "cpu"), "its draft is gone"
    directory.draft.mkdir()
    assert is_finished(directory, lambda target: first, "cpu")
    assert is_finished(directory, by_target(settings), "cpu"), "auto is float32 there"
    for other in (
        {"train": {"lr": 1.0}},
        {"data": {"path": "b.jsonl"}},
        {"draft": {"mask_token_id": 4}},
        {"capture": {"dtype": "float8_e4m3fn"}},
    ):
        assert not is_finished(directory, by_target(settings | other), "cpu")
    assert not is_finished(directory, by_target({"method": "dflash", "draft": {"mask_tokens": 3}}), "cpu")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config is None: expected a RunConfig, a mapping of its settings, or a function"),
        ("dflash", "config is 'dflash': expected a RunConfig"),
        ({}, "missing required field `method`"),
        (RunConfig(method="dflash", train=TrainConfig(lr=-1)), r"> 0\.0, got -1.* - at `\$\.train\.lr`"),
        (RunConfig(method="dflash", train=TrainConfig(accumulation=0)), r">= 1, got 0 - at `\$\.train\.accumulation`"),
        (RunConfig(method="dflash", target={"dtype": "float16"}), "expected none, as the target is hosted already"),
    ],
)
def test_what_is_no_settings_is_refused(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        by_target(config)
