"""Whether a checkpoint is the one that a run was trained on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from chats import MARKED, write_target
from specd.config.settings import TargetConfig
from specd.errors import ConfigError
from specd.targets.identity import check_same
from specd.targets.registry import load_target
from specd.targets.source import resolve, with_tokenizer


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target") / "tiny")


def fingerprint(target: Path, **settings: object) -> str:
    """As a daemon that hosts it publishes it."""
    hosted = load_target(TargetConfig(model=f"{target}/", device="cpu", **settings))  # type: ignore[arg-type]
    try:
        return hosted.contract.fingerprint
    finally:
        hosted.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_same_wherever_it_lies_and_however_it_runs(target: Path, tmp_path: Path, dtype: str) -> None:
    trained = fingerprint(target, dtype=dtype)
    check_same(resolve(f"{target}/"), trained, run="run")
    shutil.copytree(target, tmp_path / "elsewhere")
    check_same(resolve(f"{tmp_path}/elsewhere"), trained, run="run")


def weights(target: Path) -> None:
    data = bytearray((target / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (target / "model.safetensors").write_bytes(data)


def shape(target: Path) -> None:
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))


def tokenizer(target: Path) -> None:
    (target / "tokenizer_config.json").write_text((target / "tokenizer_config.json").read_text() + " ")


def template(target: Path) -> None:
    (target / "chat_template.jinja").write_text(MARKED)


@pytest.mark.parametrize(
    ("change", "what"),
    [(weights, "weights"), (shape, "weights"), (tokenizer, "tokenizer"), (template, "chat template")],
)
def test_another_is_refused_by_what_differs(
    target: Path, tmp_path: Path, change: Callable[[Path], None], what: str
) -> None:
    trained = fingerprint(target)
    shutil.copytree(target, tmp_path / "other")
    change(tmp_path / "other")
    source = resolve(f"{tmp_path}/other")
    said = rf"/other' is not the one that runs/a was trained on: {what} \w{{12}}, expected \w{{12}}\. Give --model"
    with pytest.raises(ConfigError, match=said):
        check_same(source, trained, run="runs/a")


def test_a_tokenizer_of_another_directory_counts(target: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(target / name, bare)
    trained = fingerprint(bare, tokenizer=str(target))
    check_same(with_tokenizer(resolve(f"{bare}/"), str(target)), trained, run="run")
    with pytest.raises(ConfigError, match=r"tokenizer none, expected \w+, chat template none.*, --tokenizer DIR with"):
        check_same(resolve(f"{bare}/"), trained, run="run")


def test_made_up_weights_are_no_target(target: Path) -> None:
    trained = fingerprint(target, load_format="dummy")
    with pytest.raises(ConfigError, match=r"run was trained on made-up weights .*--other-target"):
        check_same(resolve(f"{target}/"), trained, run="run")
    with pytest.raises(ConfigError, match=r"fingerprint 'a:b': expected model_type:hidden_size"):
        check_same(resolve(f"{target}/"), "a:b", run="run")
