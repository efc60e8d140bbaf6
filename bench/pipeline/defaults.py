"""The defaults of `specd bench pipeline`, by the devices of this machine."""

from __future__ import annotations

from typing import Any

import msgspec

from specd.bench.pipeline.settings import Settings
from specd.config.load import convert, merge
from specd.config.presets import preset
from specd.drafts import registry as drafts
from specd.errors import ConfigError
from specd.transports import registry

GPU_MODEL = "Qwen3-30B-A3B-FP8"
CPU_MODEL = "synthetic:hidden=128,layers=8,vocab=512,ms=15,us_per_token=10"
QUICK_MODEL = "synthetic:hidden=64,layers=8,vocab=512,ms=8,us_per_token=10"
SMALL: dict[str, Any] = {
    "draft_config": {"num_layers": 1, "num_taps": 3, "block_size": 4, "num_anchors": 16, "loss_chunk": 128},
    "batch_tokens": 256,
    "sample_tokens": 64,
    "short": 32,
    "many": 8,
    "forward_tokens": 256,
    "merge_depth": 16,
    "steps": 12,
    "warmup": 3,
}
"""Shapes that take two cores a minute."""


def defaults(quick: bool, daemons: int, model: str, given: dict[str, Any], trainers: int = 1) -> Settings:
    """The settings for this machine. given: overrides of them.

    daemons: on GPUs each has one, and each trainer one of the next ones, or the only one the last daemon's where there
    is none. Raises ConfigError for devices that this machine does not have.
    """
    import torch

    gpus = 0 if quick else torch.cuda.device_count()
    target = given.get("target", {})
    tp = target.get("tp", 1)
    if type(tp) is not int or tp < 1:
        raise ConfigError(f"--set target.tp={tp}: expected a whole number of GPUs, at least 1")
    most = max(1, (gpus - trainers) // tp) if gpus else 8
    alone = trainers == tp == gpus == 1
    if trainers < 1 or not 1 <= daemons <= most or not (alone or not gpus or daemons * tp + trainers <= gpus):
        beside = "a trainer" if trainers == 1 else f"{trainers} trainers"
        raise ConfigError(
            f"--daemons {daemons} over {tp} GPUs each: this machine's {gpus} GPUs take 1 to {most} beside {beside}"
        )
    base: dict[str, Any] = {"model": model or (GPU_MODEL if gpus else QUICK_MODEL if quick else CPU_MODEL)}
    if not gpus:
        base |= SMALL | {
            "devices": ("cpu",) * daemons,
            "trainer": "cpu",
            "trainers": trainers,
            "transports": _best("cpu"),
        }
    else:
        base |= {
            "devices": tuple(f"cuda:{index * tp}" for index in range(daemons)),
            "trainer": f"cuda:{min(daemons * tp, gpus - 1)}",
            "trainers": trainers,
            "transports": _best("cuda"),
        }
    if quick:
        base |= {"lengths": ("fixed",), "depths": (0, 2), "steps": 8}
    if (recipe := preset(base["model"])) and not gpus:
        base["draft_config"] = base["draft_config"] | {"num_taps": recipe.capture.get("num_taps", 5)}
    if "draft_config" in base:
        known = drafts.load(_trained(given)).settings.__struct_fields__
        base["draft_config"] = {key: value for key, value in base["draft_config"].items() if key in known}
    if not base["model"].startswith("synthetic"):
        given = given | {"target": {"load_format": "dummy"} | target}
    if "max_forward_tokens" in target:
        given = given | {"forward_tokens": target["max_forward_tokens"]}
    settings = convert(msgspec.to_builtins(merge(base, given)), Settings, "specd bench pipeline")
    _check(settings)
    return settings


def _trained(given: dict[str, Any]) -> str:
    """The method whose settings apply; that of a draft that only takes time is the one it stands for."""
    name = str(given.get("draft", drafts.DEFAULT))
    return name if name in drafts.names() else drafts.DEFAULT


def _best(device: str) -> tuple[str, ...]:
    """What `auto` tries first between two processes for states on `device`."""
    return tuple(registry.preferred(registry.known(()), device)[:1])


def _check(settings: Settings) -> None:
    """Raise ConfigError for settings that cannot be measured, before a process is started."""
    if min(settings.depths) < 0 or settings.steps < 2:
        raise ConfigError(f"depths {settings.depths}, {settings.steps} steps: expected depths ≥ 0 and at least 2 steps")
    if not 0 < settings.sample_tokens <= settings.batch_tokens:
        raise ConfigError(
            f"samples of {settings.sample_tokens} tokens do not fit batches of {settings.batch_tokens}: lower "
            f"--sample-tokens or raise --batch-tokens"
        )
    for name in settings.transports:
        if name != "auto" and name not in registry.names():
            raise ConfigError(f"--transports {name}: expected some of {', '.join(registry.names())}, comma-separated")
    _ = settings.sleep  # whether the draft is known
    settings.daemon(settings.devices[0], settings.slots)  # whether target and draft settings are known
