"""specd: a target model's hidden states, served to the training of draft models for speculative decoding.

Importing it does nothing: each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specd.capture import CaptureSpec
    from specd.client import Delivery, Subscriber
    from specd.config import DaemonConfig, RunConfig, SubscriberConfig, TargetConfig
    from specd.errors import SpecdError
    from specd.host import embedded, serve
    from specd.packing import Batch
    from specd.protocol import TargetContract

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "CaptureSpec",
    "DaemonConfig",
    "Delivery",
    "RunConfig",
    "SpecdError",
    "Subscriber",
    "SubscriberConfig",
    "TargetConfig",
    "TargetContract",
    "__version__",
    "embedded",
    "serve",
]

_HOMES = {
    "Batch": "specd.packing",
    "CaptureSpec": "specd.capture",
    "DaemonConfig": "specd.config",
    "Delivery": "specd.client",
    "RunConfig": "specd.config",
    "SpecdError": "specd.errors",
    "Subscriber": "specd.client",
    "SubscriberConfig": "specd.config",
    "TargetConfig": "specd.config",
    "TargetContract": "specd.protocol",
    "embedded": "specd.host",
    "serve": "specd.host",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'specd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
