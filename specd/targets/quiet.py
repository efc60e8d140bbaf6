"""Transformers without its progress bars: they would break the display of whoever called."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """No progress bars of transformers."""
    from transformers.utils import logging

    bars: Any = logging  # untyped
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
