"""Weights of predictions: the papers' figures, and which offsets count."""

from __future__ import annotations

import pytest
import torch

from specd.config.load import convert
from specd.drafts.backbone.weighting import dpace, loss_decay
from specd.drafts.dflash.settings import DFlashConfig
from specd.errors import ConfigError


@pytest.mark.parametrize(("block_size", "gamma"), [(16, 7.0), (10, 5.0), (8, 4.0), (13, 6.0), (4, 2.0)])
def test_loss_decay_is_the_papers(block_size: int, gamma: float) -> None:
    assert loss_decay(DFlashConfig(block_size=block_size)) == gamma
    assert loss_decay(DFlashConfig(block_size=block_size, loss_decay=0.0)) == 0.0
    with pytest.raises(ConfigError, match="loss_decay -3"):
        loss_decay(DFlashConfig(loss_decay=-3.0))


def test_dpace_is_the_papers_on_the_offsets_that_count() -> None:
    half = torch.full((3,), 0.5).log().neg()
    assert dpace(half, torch.tensor([1, 2, 3]), 4, 4, 0.5).tolist() == [1.734375, 0.984375, 0.421875]
    # A hole is skipped: the product goes on behind it, as if the block were shorter; blocks do not touch.
    rows = torch.tensor([1, 3, 4, 6, 7, 9])
    assert dpace(half, rows[:3], 10, 5, 0.5).tolist() == [1.734375, 0.984375, 0.421875]
    both = dpace(torch.cat((half, 2 * half)), rows, 10, 5, 0.5)
    assert both[:3].tolist() == [1.734375, 0.984375, 0.421875]
    assert both[3:].tolist() == [q + q * q + q**3 - part for q in [0.625] for part in (0.0, q, q + q * q)]
    assert dpace(half, rows[:3], 10, 5, 1.0).tolist() == [3.0, 2.0, 1.0], "a straight line"
    assert dpace(half[:0], rows[:0], 10, 5, 0.5).shape == (0,)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_an_alpha_that_teaches_nothing_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="dpace_alpha"):
        convert({"dpace_alpha": alpha}, DFlashConfig, "draft")
