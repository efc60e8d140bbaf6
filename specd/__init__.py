"""specd: a target model's hidden states, served to the training of draft models for speculative decoding.

Importing it does nothing: each name below is loaded when it is first used. docs/use.md shows them at work.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specd.client.subscriber import Subscriber as Subscriber
    from specd.config.settings import DaemonConfig as DaemonConfig
    from specd.config.settings import DataConfig as DataConfig
    from specd.config.settings import RingConfig as RingConfig
    from specd.config.settings import RunConfig as RunConfig
    from specd.config.settings import SubscriberConfig as SubscriberConfig
    from specd.config.settings import TargetConfig as TargetConfig
    from specd.config.settings import TrainConfig as TrainConfig
    from specd.daemon.serve import embedded as embedded
    from specd.daemon.serve import serve as serve
    from specd.errors import SpecdError as SpecdError
    from specd.evaluate.evaluator import evaluate_draft as evaluate_draft
    from specd.protocol.batch import Batch as Batch
    from specd.protocol.batch import Delivery as Delivery
    from specd.protocol.capture import CaptureSpec as CaptureSpec
    from specd.protocol.contract import TargetContract as TargetContract
    from specd.targets.transformers.load import load_causal_lm as load_causal_lm
    from specd.train.trainer import train_draft as train_draft
    from specd.version import __version__ as __version__

_HOMES = {
    "Batch": "protocol.batch",
    "CaptureSpec": "protocol.capture",
    "DaemonConfig": "config.settings",
    "DataConfig": "config.settings",
    "Delivery": "protocol.batch",
    "RingConfig": "config.settings",
    "RunConfig": "config.settings",
    "SpecdError": "errors",
    "Subscriber": "client.subscriber",
    "SubscriberConfig": "config.settings",
    "TargetConfig": "config.settings",
    "TargetContract": "protocol.contract",
    "TrainConfig": "config.settings",
    "__version__": "version",
    "embedded": "daemon.serve",
    "evaluate_draft": "evaluate.evaluator",
    "load_causal_lm": "targets.transformers.load",
    "serve": "daemon.serve",
    "train_draft": "train.trainer",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]  # the names above are exported as themselves


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"specd.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'specd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
