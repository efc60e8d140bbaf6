"""What a forward's hooks write, and where: whole slots, parts of them, and nothing beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specd.errors import TargetError
from specd.targets.sglang.capture import AllCaptured, Capture, head_hook, layer_hook

HIDDEN = 4


def test_a_part_of_the_rows_goes_where_the_whole_would() -> None:
    slots = [torch.zeros(3, HIDDEN), torch.zeros(5, HIDDEN), torch.zeros(2, HIDDEN)]
    whole = Capture(taps={1: [(0, 3, slots[0]), (3, 8, slots[1])]}, final=[(8, 10, slots[2])])
    part = whole.rows(2, 9)
    assert [(start, end) for start, end, _ in part.taps[1]] == [(0, 1), (1, 6)]
    assert [(start, end) for start, end, _ in part.final] == [(6, 7)]
    for start, end, out in (*part.taps[1], *part.final):
        out.copy_(torch.ones(end - start, HIDDEN))
    assert [slot.sum(1).tolist() for slot in slots] == [[0, 0, 4], [4] * 5, [4, 0]]


@pytest.mark.parametrize("hidden_alone", [True, False])
def test_a_layer_gives_the_stream_with_its_residual_or_without(hidden_alone: bool) -> None:
    hidden, residual = torch.randn(5, HIDDEN), torch.randn(5, HIDDEN)
    out = torch.zeros(3, HIDDEN)
    hook = layer_hook([(1, 4, out)], 5, hidden_alone)
    hook(torch.nn.Identity(), (), {}, (hidden, residual))
    assert torch.equal(out, (hidden if hidden_alone else hidden + residual)[1:4])


@pytest.mark.parametrize("output", [torch.zeros(4, HIDDEN), (torch.zeros(5, 2, HIDDEN), None)], ids=["rows", "shape"])
def test_a_layer_that_gives_something_else_is_refused(output: Any) -> None:
    with pytest.raises(TargetError, match="use --backend transformers"):
        layer_hook([], 5, False)(torch.nn.Identity(), (), {}, output)


def test_the_head_writes_final_states_and_ends_the_forward() -> None:
    final, hidden = torch.zeros(2, HIDDEN), torch.randn(5, HIDDEN)
    hook = head_hook(Capture(taps={}, final=[(3, 5, final)]), None)
    with pytest.raises(AllCaptured):
        hook(torch.nn.Identity(), (torch.arange(5), hidden), {})
    assert torch.equal(final, hidden[3:])
    with pytest.raises(TargetError, match="use --backend transformers"):
        hook(torch.nn.Identity(), (torch.arange(5),), {})
