"""Settings from files and `--set`: what becomes of them, and every refusal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from specd.config.load import as_begun, convert, load_yaml, merge, overrides
from specd.config.settings import (
    RunConfig,
    SubscriberConfig,
)
from specd.errors import ConfigError


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_and_settings_on_top_become_structs(tmp_path: Path) -> None:
    path = write(
        tmp_path, "train: {lr: 1.0e-4, epochs: 3}\nsubscriber:\n  endpoints: [ipc:///a, 'tcp://127.0.0.1:5000']\n"
    )
    data = merge(load_yaml(path), overrides(["method=x", "train.lr=3e-4", "draft.num_taps=3", "subscriber.depth=0"]))
    run = convert(data, RunConfig, str(path))
    assert (run.train.lr, run.train.epochs, run.draft) == (3e-4, 3, {"num_taps": 3})
    assert run.subscriber == SubscriberConfig(endpoints=("ipc:///a", "tcp://127.0.0.1:5000"), depth=0)
    assert run.data == RunConfig(method="x").data


def test_a_file_reads_values_as_set_does(tmp_path: Path) -> None:
    path = write(
        tmp_path, "method: x\ntrain: {lr: 6e-4, betas: [9e-1, 9.5e-1]}\noutput: '1e5'\ndata: {path: 2024-13-01}\n"
    )
    run = convert(load_yaml(path), RunConfig, str(path))
    assert (run.train.lr, run.train.betas, run.output) == (6e-4, (0.9, 0.95), "1e5")
    assert run.data.path == "2024-13-01", "no date, and so no wrong one"
    pairs = ["method=x", "train.lr=6e-4", "train.betas=[9e-1, 9.5e-1]", "output='1e5'", "data.path=2024-13-01"]
    assert convert(overrides(pairs), RunConfig, "settings") == run


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    with pytest.raises(ConfigError, match=r"cannot read config file '.*none\.yaml': No such file or directory"):
        load_yaml(missing)
    with pytest.raises(ConfigError, match="Is a directory"):
        load_yaml(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a: 1")
    path.chmod(0)
    with pytest.raises(ConfigError, match="Permission denied"):
        load_yaml(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds a list, expected a mapping"),
        ("just words\n", "holds a str, expected a mapping"),
        ("", "holds nothing, expected a mapping"),
        ("a: {b: 1, 'b': 2}\n", "b is given twice: keep one"),
        ("a: [1,\n", "is not YAML"),
        ("a: 1\n\tb: 2\n", "is not YAML"),
        ("!!python/object/apply:os.system ['true']\n", "is not YAML"),
        (b"a: \xff\xfe\n", "is not YAML"),
        (b"a: \x00\n", "is not YAML"),
    ],
)
def test_a_file_that_is_no_mapping_in_yaml_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_yaml(write(tmp_path, text))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("a=1", 1),
        ("a=-0.5", -0.5),
        ("a=3e-4", 3e-4),
        ("a=1.0e3", 1000.0),
        ("a=true", True),
        ("a=null", None),
        ("a=", None),
        ("a=word", "word"),
        ("a=6E4", 6e4),
        ("a=.5e-2", 5e-3),
        ("a='3e-4'", "3e-4"),
        ("a=3e-4x", "3e-4x"),
        ("a=[9e-1, 0.95]", [0.9, 0.95]),
        ("a=nan", "nan"),
        ("a=ipc:///run/x.sock", "ipc:///run/x.sock"),
        ("a=x=y", "x=y"),
        ("a=[1, 2]", [1, 2]),
        ("a={b: 2}", {"b": 2}),
    ],
)
def test_values_of_set_are_yaml(setting: str, value: object) -> None:
    found = overrides([setting])
    assert found == {"a": value}
    assert type(found["a"]) is type(value)


def test_set_nests_and_the_later_one_wins() -> None:
    settings = ["a.b.c=1", "a.b.d=2", "a.b.c=3", "x=4", "a.e={f: 5}", "a.e.g=6"]
    assert overrides(settings) == {"a": {"b": {"c": 3, "d": 2}, "e": {"f": 5, "g": 6}}, "x": 4}
    assert overrides([]) == {}


@pytest.mark.parametrize("setting", ["", "a", "=1", "a..b=1", ".a=1", "a.=1", "a=[1", "a={"])
def test_malformed_settings_are_refused_and_shown(setting: str) -> None:
    with pytest.raises(ConfigError) as caught:
        overrides([setting])
    assert f"--set {setting!r}" in str(caught.value)


def test_a_run_of_0_1_0_is_what_it_was_then() -> None:
    assert as_begun({"draft": {"num_layers": 2}}) == {"method": "dflash", "draft": {"loss": "decay", "num_layers": 2}}
    assert as_begun({"method": "dflash"}) == {"method": "dflash"}


def test_merge_leaves_its_arguments_alone() -> None:
    base, over = {"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2]}
    assert merge(base, over) == {"a": {"b": 1, "d": 2}, "c": [2]}
    assert (base, over) == ({"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2]})
    assert merge({"a": {"b": 1}}, {"a": 3}) == {"a": 3}
    assert merge({"a": 3}, {"a": {"b": 1}}) == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"method": "x", "output": "runs/caf\udce9"},
            r"run: output 'runs/caf\\xe9' is not UTF-8, .*; give a path that is",
        ),
        (
            {"method": "x", "data": {"path": ["a.jsonl", "\udcff.jsonl"]}},
            r"run: data\.path '\\xff\.jsonl' is not UTF-8",
        ),
        ({"method": "x", "target": {"model": "\ud800"}}, r"run: target\.model '\\ud800' is not UTF-8"),
        ({"method": "x", "train": {"max_minutes": float("inf")}}, r"run: train\.max_minutes is inf: expected a finite"),
        ({"method": "x", "draft": {"loss_decay": float("nan")}}, r"run: draft\.loss_decay is nan: expected a finite"),
    ],
)
def test_what_no_file_can_hold_is_refused(data: dict[str, object], said: str) -> None:
    """A path whose bytes are no UTF-8 is one: run.json and messages to a daemon are UTF-8, and JSON has no infinity."""
    with pytest.raises(ConfigError, match=f"^{said}"):
        convert(data, RunConfig, "run")
