"""The registry of targets: built-in backends, one from another package, and which one `auto` takes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from specd.config.settings import TargetConfig
from specd.errors import ConfigError
from specd.targets.base import Target
from specd.targets.registry import BUILTIN, load_target, names, pick_backend
from specd.targets.suite import TargetConformance
from specd.targets.synthetic import SyntheticTarget


class Echo(SyntheticTarget):
    """A backend from another package, with one backend-specific setting."""

    settings: ClassVar[frozenset[str]] = frozenset({"tp"})


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Its metadata, as `pip install` would leave it."""
    site = tmp_path_factory.mktemp("site")
    info = site / "specd_echo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: specd-echo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[specd.targets]\necho = specd_echo:Echo\nlost = specd_echo.no:Where\n")
    (site / "specd_echo.py").write_text("")
    sys.path.insert(0, str(site))
    import specd_echo  # type: ignore[import-not-found]

    specd_echo.Echo = Echo
    yield
    sys.path.remove(str(site))
    del sys.modules["specd_echo"]


class TestPlugin(TargetConformance):
    def make(self, directory: Path) -> Target:
        return load_target(TargetConfig(model="synthetic:hidden=16,layers=4,vocab=50", backend="echo", tp=2))


def test_a_backend_is_known_by_its_entry_point() -> None:
    assert names() == [*BUILTIN, "echo", "lost"]
    with pytest.raises(ConfigError, match=r"unknown target backend 'vllm'; known here: sglang, transformers"):
        load_target(TargetConfig(model="x", backend="vllm"))
    with pytest.raises(ConfigError, match=r"target backend 'lost' cannot be imported: ModuleNotFoundError"):
        load_target(TargetConfig(model="x", backend="lost"))


def test_a_setting_that_a_backend_would_ignore_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"target\.memory_fraction=0\.5 is no setting of the backend echo"):
        load_target(TargetConfig(model="synthetic:hidden=16", backend="echo", memory_fraction=0.5))
    with pytest.raises(ConfigError, match=r"target\.tp=2 is no setting of the backend synthetic"):
        load_target(TargetConfig(model="synthetic:hidden=16", tp=2))
    with pytest.raises(ConfigError, match=r"target\.tokenizer=/its is no setting of the backend synthetic"):
        load_target(TargetConfig(model="synthetic:hidden=16", tokenizer="/its"))


@pytest.mark.parametrize(
    ("installed", "gpu", "device", "model", "backend", "why"),
    [
        (True, True, "auto", "Qwen3-8B", "sglang", "it is installed, and there is a GPU"),
        (True, False, "auto", "Qwen3-8B", "transformers", "there is no GPU"),
        (False, True, "cuda:0", "Qwen3-8B", "transformers", "SGLang is not installed"),
        (True, True, "cpu", "Qwen3-8B", "transformers", "on the CPU"),
        (True, True, "auto", "synthetic:hidden=8", "synthetic", "its name says so"),
    ],
)
def test_auto_takes_sglang_where_it_can(
    monkeypatch: pytest.MonkeyPatch, installed: bool, gpu: bool, device: str, model: str, backend: str, why: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    found, reason = pick_backend(TargetConfig(model=model, device=device))
    assert found == backend
    assert why in reason
