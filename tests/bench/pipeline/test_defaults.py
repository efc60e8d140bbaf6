"""What is measured by default: by the devices that are here, and what they cannot do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specd.bench.pipeline.defaults import SMALL, defaults
from specd.errors import ConfigError

TINY = "synthetic:hidden=32,layers=8,vocab=64"


def test_what_is_asked_for_stands_beside_the_defaults() -> None:
    settings = defaults(True, 1, TINY, {"draft_config": {"num_layers": 2}})
    assert settings.draft_config == SMALL["draft_config"] | {"num_layers": 2}
    assert defaults(True, 1, TINY, {"target": {"max_forward_tokens": 512}}).forward_tokens == 512
    eagle = defaults(True, 1, TINY, {"draft": "eagle3", "draft_config": {"num_steps": 2}})
    assert eagle.draft_config == {"loss_chunk": 128, "num_steps": 2}, "what a method does not know is left out"
    assert defaults(True, 1, TINY, {"draft": "synthetic:ms=1"}).draft_config == SMALL["draft_config"]


def test_daemons_and_trainer_get_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    one, three = defaults(False, 1, TINY, {}), defaults(False, 3, TINY, {})
    assert (one.devices, one.trainer, one.transports) == (("cuda:0",), "cuda:1", ("cuda_ipc",))
    assert (three.devices, three.trainer, three.shared) == (("cuda:0", "cuda:1", "cuda:2"), "cuda:3", False)
    spread = defaults(False, 1, TINY, {"target": {"tp": 2}})
    assert (spread.daemon_devices, spread.trainer) == (("cuda:0", "cuda:1"), "cuda:2")
    several = defaults(False, 2, TINY, {}, trainers=2)
    assert (several.devices, several.trainer_devices) == (("cuda:0", "cuda:1"), ("cuda:2", "cuda:3"))
    assert (several.num_devices, several.devices_of(1)) == (4, 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert defaults(False, 1, TINY, {}).shared
    with pytest.raises(ConfigError, match="1 GPUs take 1 to 1 beside 2 trainers"):
        defaults(False, 1, TINY, {}, trainers=2)


@pytest.mark.parametrize(
    ("daemons", "asked", "reason"),
    [
        (4, {}, "--daemons 4 over 1 GPUs each: this machine's 4 GPUs take 1 to 3 beside a trainer"),
        (1, {"target": {"tp": 4}}, "--daemons 1 over 4 GPUs each: this machine's 4 GPUs"),
        (1, {"target": {"tp": True}}, "target.tp=True: expected a whole number"),
        (1, {"depths": (-1,)}, "expected depths ≥ 0"),
        (1, {"steps": 1}, "at least 2 steps"),
    ],
)
def test_what_this_machine_cannot_do(
    daemons: int, asked: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ConfigError) as raised:
        defaults(False, daemons, TINY, asked)
    assert reason in str(raised.value)
