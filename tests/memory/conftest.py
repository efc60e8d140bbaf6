"""An epoch for a test's shared memory, which the test has to give back."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

from specd.memory.segment import segment_path


@pytest.fixture
def epoch() -> Iterator[str]:
    epoch = secrets.token_hex(16)
    yield epoch
    assert not os.path.exists(segment_path(epoch)), "the test left a segment"
