"""Every setting says what it means, and a wrong key is told the right one."""

from __future__ import annotations

from typing import Any

import pytest

from specd.config.describe import meanings, meant, settings, summary
from specd.config.load import convert
from specd.config.presets import Preset
from specd.config.settings import Config, DaemonConfig, RunConfig
from specd.drafts import registry
from specd.errors import ConfigError


class Inner(Config, kw_only=True, frozen=True):
    """What is inside.

    one, two: both of
    them; not three. rest: what is left: all of it.
    """

    one: int = 1
    two: int = 2
    rest: int = 3
    silent: int = 4


class Outer(Config, kw_only=True, frozen=True):
    """What is outside. inner: a section."""

    inner: Inner = Inner()


def test_meanings_are_read_from_the_docstring() -> None:
    assert meanings(Inner) == {
        "one": "both of them; not three",
        "two": "both of them; not three",
        "rest": "what is left: all of it",
    }
    assert summary(Inner) == "What is inside."
    assert [(path, said) for path, _, said in settings(Outer)][2:] == [
        ("inner.rest", "what is left: all of it"),
        ("inner.silent", ""),
    ]


@pytest.mark.parametrize(
    "kind", [RunConfig, DaemonConfig, *(registry.load(name).settings for name in registry.BUILTIN)]
)
def test_every_setting_says_what_it_means(kind: type[Config]) -> None:
    found = list(settings(kind))
    assert len(found) > 10
    assert [path for path, _, meaning in found if len(meaning) < 8] == []


@pytest.mark.parametrize(
    ("key", "at", "right"),
    [
        ("epoch", "train.", "train.epochs"),
        ("max-steps", "train.", "train.max_steps"),
        ("learning_rate", "train.", "train.lr"),
        ("gradient_clipping", "train.", "train.clip"),
        ("batch_size", "train.", "data.batch_tokens"),
        ("lr", "", "train.lr"),
        ("slots", "subscriber.", ""),
        ("colour", "train.", ""),
    ],
)
def test_a_wrong_key_may_have_meant_another(key: str, at: str, right: str) -> None:
    assert meant(key, at, RunConfig) == right


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"inner": {"on": 1}}, "unknown field `on` - at `$.inner`; did you mean inner.one?"),
        ({"rest": 1}, "unknown field `rest`; did you mean inner.rest?"),
        ({"inner": {"colour": 1}}, "unknown field `colour` - at `$.inner`; expected one of one, rest, silent, two"),
        ({"colour": 1}, "unknown field `colour`; expected one of inner"),
    ],
)
def test_errors_say_so(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        convert(data, Outer, "here")
    assert str(raised.value) == f"here: Object contains {said}"


def test_a_preset_is_no_setting_of_a_run() -> None:
    with pytest.raises(ConfigError, match="unknown field `gguff`; did you mean gguf"):
        convert({"name": "x", "gguff": "y"}, Preset, "preset x")
