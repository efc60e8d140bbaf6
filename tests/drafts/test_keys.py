"""Keys of a config.json: which of two of one name counts, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest

from specd.drafts.keys import check, check_architecture, flat
from specd.errors import ConfigError


def test_a_section_goes_before_the_top_and_null_is_nothing() -> None:
    config = {"a": 1, "b": 2, "c": None, "d": 4, "inner": {"a": 10, "b": None, "e": 5}}
    assert flat(config, "inner") == {"a": 10, "b": 2, "d": 4, "e": 5}
    assert flat({"a": 1}, "inner") == flat({"a": 1, "inner": None}, "inner") == {"a": 1}
    with pytest.raises(ConfigError, match="inner is 3, expected an object"):
        flat({"inner": 3}, "inner")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"kind": "b"}, "draft 'here': kind is 'b', expected 'a' or 1; specd cannot run this draft"),
        ({"never": 0}, "never is 0, expected none"),
        ({"z": 1, "y": "two", "size": 3}, "its config.json has y='two', z=1, which specd does not know"),
    ],
)
def test_what_is_not_known_is_named(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check(config, "here", read={"size"}, only={"kind": ("a", 1), "never": ()})


def test_what_is_known_passes() -> None:
    config = {"kind": 1.0, "size": 3, "transformers_version": "5", "rope_theta": 1.0, "torch_dtype": "float16"}
    check(config, "here", read={"size"}, only={"kind": ("a", 1), "never": ()})


@pytest.mark.parametrize("found", [None, 5, "A", [], [["A"]], [3], ["B"]])
def test_another_architecture_is_refused(found: Any) -> None:
    with pytest.raises(ConfigError, match=r"architectures is .*, expected one of A, A2; it is no draft of this method"):
        check_architecture({"architectures": found}, "here", ("A", "A2"))
    check_architecture({"architectures": ["B", "A2"]}, "here", ("A", "A2"))
