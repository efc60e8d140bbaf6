"""What attentions by flex_attention share: when it is used, and whole tiles. Masks: see those who make them."""

from __future__ import annotations

import pytest
import torch

from specd.config.settings import AttentionKind
from specd.drafts.flex import in_tiles, in_whole_tiles, trains_by_flex
from specd.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("kind", "head_dim", "device", "uses"),
    [
        ("auto", 64, GPU, True), ("auto", 16, GPU, True), ("auto", 8, GPU, False), ("flex", 8, GPU, True),
        ("sdpa", 64, GPU, False), ("auto", 64, CPU, False), ("sdpa", 64, CPU, False),
    ],
)  # fmt: skip
def test_it_is_for_gpus_and_heads_that_its_kernels_take(
    kind: AttentionKind, head_dim: int, device: torch.device, uses: bool
) -> None:
    assert trains_by_flex(kind, head_dim, device) is uses


def test_it_is_refused_where_it_has_no_gradients() -> None:
    with pytest.raises(ConfigError, match=r"draft\.attention=flex on cpu: .* use auto or sdpa"):
        trains_by_flex("flex", 64, CPU)


@pytest.mark.parametrize(("size", "whole"), [(0, 256), (1, 256), (256, 256), (257, 384), (1280, 1280)])
def test_whole_tiles_are_two_at_least(size: int, whole: int) -> None:
    assert in_whole_tiles(size) == whole
    x = torch.randn(size, 2, 4)
    filled = in_tiles(x, whole)
    assert filled.shape == (whole // 128, 128, 2, 4)
    assert torch.equal(filled.flatten(0, 1)[:size], x)
    assert not filled.flatten(0, 1)[size:].any()
