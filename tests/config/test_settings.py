"""Configuration: YAML files, --set, presets, places; and one clear message for everything that is wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from specd.config.load import convert, load_yaml, merge, overrides
from specd.config.presets import preset, presets
from specd.config.settings import (
    CaptureConfig,
    DaemonConfig,
    DFlashConfig,
    RingConfig,
    RunConfig,
    SubscriberConfig,
    TargetConfig,
)
from specd.endpoints import host_id, resolve_endpoint
from specd.errors import ConfigError
from specd.paths import cache_dir, runtime_dir


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_and_settings_on_top_become_structs(tmp_path: Path) -> None:
    path = write(
        tmp_path, "train: {lr: 1.0e-4, epochs: 3}\nsubscriber:\n  endpoints: [ipc:///a, 'tcp://127.0.0.1:5000']\n"
    )
    data = merge(load_yaml(path), overrides(["train.lr=3e-4", "draft.num_taps=3", "subscriber.depth=0"]))
    run = convert(data, RunConfig, str(path))
    assert (run.train.lr, run.train.epochs, run.draft.num_taps) == (3e-4, 3, 3)
    assert run.subscriber == SubscriberConfig(endpoints=("ipc:///a", "tcp://127.0.0.1:5000"), depth=0)
    assert run.data == RunConfig().data


def test_a_file_reads_values_as_set_does(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {lr: 6e-4, betas: [9e-1, 9.5e-1]}\noutput: '1e5'\ndata: {path: 2024-13-01}\n")
    run = convert(load_yaml(path), RunConfig, str(path))
    assert (run.train.lr, run.train.betas, run.output) == (6e-4, (0.9, 0.95), "1e5")
    assert run.data.path == "2024-13-01", "no date, and so no wrong one"
    pairs = ["train.lr=6e-4", "train.betas=[9e-1, 9.5e-1]", "output='1e5'", "data.path=2024-13-01"]
    assert convert(overrides(pairs), RunConfig, "settings") == run


def test_a_run_takes_any_overrides_of_a_hosted_target() -> None:
    run = convert(overrides(["target.exact=true", "target.dtype=bfloat16"]), RunConfig, "settings")
    assert run.target == {"exact": True, "dtype": "bfloat16"}
    assert RunConfig().target == {}, "daemons have settings of their own"


def test_configuration_is_frozen() -> None:
    with pytest.raises(AttributeError):
        RingConfig().slots = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ({"ring": {"slot": 3}}, DaemonConfig, "conf: Object contains unknown field `slot` - at `$.ring`"),
        ({"learning_rate": 1}, RunConfig, "conf: Object contains unknown field `learning_rate`"),
        ({"target": [1]}, RunConfig, "conf: Expected `object`, got `array` - at `$.target`"),
        ({}, TargetConfig, "conf: Object missing required field `model`"),
        ({"model": "m", "backend": "vllm"}, TargetConfig, "conf: Invalid enum value 'vllm' - at `$.backend`"),
        ({"slots": "many"}, RingConfig, "conf: Expected `int`, got `str` - at `$.slots`"),
        ({"slots": 1.5}, RingConfig, r"conf: Expected `int`, got `float` - at `$.slots`"),
        ({"final": 1}, CaptureConfig, "conf: Expected `bool`, got `int` - at `$.final`"),
        ([], RingConfig, "conf: Expected `object`, got `array`"),
        ({"train": {"log_every": 0}}, RunConfig, "conf: Expected `int` >= 1, got 0 - at `$.train.log_every`"),
        ({"train": {"accumulation": 0}}, RunConfig, "conf: Expected `int` >= 1, got 0 - at `$.train.accumulation`"),
        ({"train": {"lr": -1}}, RunConfig, "conf: Expected `float` > 0.0, got -1 - at `$.train.lr`"),
        ({"train": {"lr": float("nan")}}, RunConfig, "conf: Expected `float` > 0.0, got nan - at `$.train.lr`"),
        ({"train": {"betas": [0.9, 1.5]}}, RunConfig, "conf: Expected `float` < 1.0, got 1.5 - at `$.train.betas[1]`"),
        ({"train": {"threads": -1}}, RunConfig, "conf: Expected `int` >= 0, got -1 - at `$.train.threads`"),
        ({"train": {"max_steps": -1}}, RunConfig, "conf: Expected `int` >= 0, got -1 - at `$.train.max_steps`"),
        ({"train": {"warmup_ratio": 2}}, RunConfig, "conf: Expected `float` <= 1.0, got 2 - at `$.train.warmup_ratio`"),
        ({"draft": {"loss_chunk": 0}}, RunConfig, "conf: Expected `int` >= 1, got 0 - at `$.draft.loss_chunk`"),
        ({"draft": {"num_anchors": 0}}, RunConfig, "conf: Expected `int` >= 1, got 0 - at `$.draft.num_anchors`"),
        ({"num_anchors": -1}, DFlashConfig, "conf: Expected `int` >= 1, got -1 - at `$.num_anchors`"),
        ({"data": {"batch_tokens": 0}}, RunConfig, "conf: Expected `int` >= 1, got 0 - at `$.data.batch_tokens`"),
        ({"model": "m", "num_layers": -1}, TargetConfig, "conf: Expected `int` >= 0, got -1 - at `$.num_layers`"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(data: Any, kind: type[Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(data, kind, "conf")
    assert message in str(caught.value)


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


def test_merge_leaves_its_arguments_alone() -> None:
    base, over = {"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2]}
    assert merge(base, over) == {"a": {"b": 1, "d": 2}, "c": [2]}
    assert (base, over) == ({"a": {"b": 1}, "c": [1]}, {"a": {"d": 2}, "c": [2]})
    assert merge({"a": {"b": 1}}, {"a": 3}) == {"a": 3}
    assert merge({"a": 3}, {"a": {"b": 1}}) == {"a": {"b": 1}}


def test_every_preset_loads_and_its_overrides_fit() -> None:
    assert presets()
    for name in presets():
        found = preset(name)
        assert found is not None
        assert found.name.lower() == name.lower()
        convert(found.capture, CaptureConfig, name)
        convert(found.ring, RingConfig, name)
        convert(found.run, RunConfig, name)
        assert found.mask_token_id >= 0
        assert found.config["num_hidden_layers"] > 0


def test_a_preset_is_found_however_it_is_written() -> None:
    plain = preset("smollm2-135m")
    assert plain is not None
    assert preset("SmolLM2-135M") == preset("someone/SmolLM2-135M") == plain
    assert preset("a/b/smollm2-135m") is None
    assert preset("no-such-model") is None
    assert preset("") is None


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5555", "ipc:///run/a.sock", "inproc://x", "ipc://" + "x" * 107])
def test_endpoints_stay_as_they_are(endpoint: str) -> None:
    assert resolve_endpoint(endpoint) == endpoint


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "default",
        "ipc://",
        "ipc:/run/a",
        "udp://host:1",
        "://x",
        "http://host:80",
        "ipc://" + "ü" * 54,
        "tcp://127.0.0.1",
        "tcp://::1:70",
        "tcp://host:99999",
        "tcp://host:",
    ],
)
def test_malformed_endpoints_are_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="endpoint"):
        resolve_endpoint(endpoint)


def test_the_default_endpoint_is_this_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_dir() == tmp_path / f"specd-{os.getuid()}"
    assert resolve_endpoint("auto") == f"ipc://{tmp_path}/specd-{os.getuid()}/default.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "other"))
    assert runtime_dir().parent == tmp_path / "other"


def test_the_cache_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPECD_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("SPECD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "specd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "specd"


def test_the_host_id_is_stable_and_fits_its_message() -> None:
    assert host_id() == host_id()
    assert 0 < len(host_id()) <= 200
