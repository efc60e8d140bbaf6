"""The suite for target backends, over those that run here and one from another package."""

from __future__ import annotations

from pathlib import Path

from chats import write_target
from specd.config.settings import TargetConfig
from specd.targets.base import Target
from specd.targets.registry import load_target
from specd.targets.suite import TargetConformance


class TestTransformers(TargetConformance):
    def make(self, directory: Path) -> Target:
        return load_target(TargetConfig(model=str(write_target(directory / "model")), device="cpu"))


class TestSynthetic(TargetConformance):
    def make(self, directory: Path) -> Target:
        return load_target(TargetConfig(model="synthetic:hidden=32,layers=6,vocab=99"))
