"""specd: a target model's hidden states, served to the training of draft models for speculative decoding.

Importing it does nothing: each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specd.client.subscriber import Subscriber
    from specd.config.settings import DaemonConfig, RunConfig, SubscriberConfig, TargetConfig
    from specd.daemon.serve import embedded, serve
    from specd.errors import SpecdError
    from specd.protocol.batch import Batch, Delivery
    from specd.protocol.capture import CaptureSpec
    from specd.protocol.contract import TargetContract

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
    "__version__": "specd.version",
    "Batch": "specd.protocol.batch",
    "CaptureSpec": "specd.protocol.capture",
    "DaemonConfig": "specd.config.settings",
    "Delivery": "specd.client.subscriber",
    "RunConfig": "specd.config.settings",
    "SpecdError": "specd.errors",
    "Subscriber": "specd.client.subscriber",
    "SubscriberConfig": "specd.config.settings",
    "TargetConfig": "specd.config.settings",
    "TargetContract": "specd.protocol.messages",
    "embedded": "specd.daemon.serve",
    "serve": "specd.daemon.serve",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'specd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
