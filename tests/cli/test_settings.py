"""Settings from the command line: which of a recipe, a file, flags and `--set` wins."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from specd.cli import settings
from specd.config.presets import Preset
from specd.config.settings import RunConfig, StatesConfig, TargetConfig, TrainConfig, ValidationConfig
from specd.data.rows import DEMO
from specd.errors import ConfigError


def test_flags_win_over_the_file_and_settings_over_flags() -> None:
    file = {"target": {"model": "smollm2-135m", "dtype": "float16"}, "ring": {"slots": 3, "slot_tokens": 77}}
    flags = settings.given({"target": {"dtype": "bfloat16", "device": ""}, "ring": {"slots": 5}, "transports": []})
    config = settings.daemon_config(file, flags, ["ring.slots=6", "target.threads=2"])
    assert config.target.model == "smollm2-135m"
    assert (config.target.dtype, config.target.threads, config.target.device) == ("bfloat16", 2, "auto")
    assert (config.ring.slots, config.ring.slot_tokens) == (6, 77)
    assert config.transports == ("auto",)


def test_given_keeps_false_and_zero() -> None:
    assert settings.given({"a": False, "b": 0, "c": None, "d": "", "e": {"f": []}}) == {"a": False, "b": 0}


def test_a_recipe_goes_by_the_models_name_alone_or_is_asked_for(tmp_path: Path) -> None:
    """A directory is never a preset, whatever it is called."""
    named = {"target": {"model": "Qwen3-8B"}}
    elsewhere = {"target": {"model": str(tmp_path / "Qwen3-8B")}}
    recipe = settings.daemon_config({}, {"target": {"model": "smollm2-135m"}}, [])
    assert (recipe.target.threads, recipe.ring.slot_tokens) == (1, 1024)
    for asked in (named, elsewhere):
        assert settings.daemon_config({}, asked, []).ring.slot_tokens == 4096
    taken = settings.daemon_config({}, elsewhere, ["ring.slots=3"], preset="SmolLM2-135M")
    assert (taken.target, taken.ring.slots, taken.ring.slot_tokens) == (
        TargetConfig(model=elsewhere["target"]["model"], threads=1), 3, 1024,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"preset 'gpt2': expected one of .*Qwen3-30B-A3B-FP8, Qwen3-4B"):
        settings.daemon_config({}, named, [], preset="gpt2")


def test_what_is_hosted_here_is_sized_for_the_draft() -> None:
    run = RunConfig(method="dflash", draft={"num_taps": 3}, train=TrainConfig(device="cpu"))
    daemon = settings.hosting_config(run, "smollm2-135m")
    assert (daemon.capture.num_taps, daemon.capture.final, daemon.ring.slots) == (3, False, 4)
    assert daemon.ring.slot_tokens == run.data.batch_tokens
    assert daemon.capture.dtype == "auto"
    decoding = RunConfig(method="dflash", validation=ValidationConfig(decode_every=9))
    ring = settings.hosting_config(decoding, "smollm2-135m").ring
    assert (ring.slots, ring.max_sessions) == (5, 2), "whoever decodes has a session of its own"
    rounded = msgspec.structs.replace(run, capture=StatesConfig(dtype="float8_e4m3fn"))
    assert settings.hosting_config(rounded, "smollm2-135m").capture.dtype == "float8_e4m3fn"
    mixed = msgspec.structs.replace(rounded, validation=decoding.validation)
    assert settings.hosting_config(mixed, "smollm2-135m").capture.dtype == "auto", (
        "whoever decodes has them as they are"
    )
    exact = msgspec.structs.replace(mixed, target={"exact": True})
    with pytest.raises(ConfigError, match=r"settings: capture.dtype=float8_e4m3fn with target.exact=true.*leave one"):
        settings.hosting_config(exact, "smollm2-135m")
    asked = ["target.model=smollm2-135m", "target.exact=true", "capture.dtype=float8_e4m3fn"]
    with pytest.raises(ConfigError, match=r"specd start: capture.dtype=float8_e4m3fn with target.exact=true"):
        settings.daemon_config({}, {}, asked)
    with pytest.raises(ConfigError, match=r"settings: .*num_tabs"):
        settings.hosting_config(RunConfig(method="dflash", draft={"num_tabs": 3}), "smollm2-135m")


@pytest.mark.usefixtures("example")
def test_slots_hold_the_dtype_that_the_draft_asks_for() -> None:
    assert settings.hosting_config(RunConfig(method="toy"), "smollm2-135m").capture.dtype == "float32"


def test_data_is_the_methods_or_what_comes_with_specd(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Preset(name="owl", run={"toy": {"data": {"path": "owl.jsonl", "max_length": 7}}})
    monkeypatch.setattr(settings, "recipe_of", lambda preset, model: recipe)
    found = settings.data_config([], "owl", [], method="toy")
    assert (found.path, found.max_length) == ("owl.jsonl", 7)
    assert settings.data_config([], "owl", []).path == DEMO
    assert settings.data_config(["mine.jsonl"], "owl", []).path == "mine.jsonl"
    several = settings.data_config(["mine.jsonl", "yours.jsonl"], "owl", ["weights=[1, 2]"])
    assert (several.path, several.weights) == (("mine.jsonl", "yours.jsonl"), (1.0, 2.0))


def test_data_is_named_by_option_or_argument() -> None:
    assert settings.named(["a", "b"], None, ["c"]) == ("a", "b", "c")
    assert settings.named(None, []) == ()
    assert settings.paths([]) == {}


def test_a_target_that_must_be_named_is_asked_for_with_the_presets() -> None:
    assert settings.needed("owl") == "owl"
    with pytest.raises(ConfigError, match=r"no target given: expected --model with a preset \(.*smollm2-135m"):
        settings.needed("")
