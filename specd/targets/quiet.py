"""Transformers without its progress bars and warnings, which would break the caller's display."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Disable transformers' progress bars."""
    from transformers.utils import logging

    bars: Any = logging  # untyped
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Let transformers log errors alone."""
    from transformers.utils import logging

    log: Any = logging  # untyped
    level = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)
