"""EAGLE-3 keeps the contract of the family."""

from __future__ import annotations

from typing import ClassVar

from specd.config.settings import Config
from specd.drafts.base import Method
from specd.drafts.eagle3.method import Eagle3Method
from specd.drafts.eagle3.settings import Eagle3Config
from specd.drafts.suite import DraftConformance


class TestEagle3(DraftConformance):
    method: ClassVar[type[Method]] = Eagle3Method
    settings: ClassVar[Config] = Eagle3Config(num_steps=4, draft_vocab_size=60, loss_chunk=5)


class TestEveryToken(DraftConformance):
    method: ClassVar[type[Method]] = Eagle3Method
    settings: ClassVar[Config] = Eagle3Config(num_steps=3, draft_vocab_size=0, norm_output=True, fc_norm=True)
