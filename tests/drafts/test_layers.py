"""Layers that drafts share, held against transformers' own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama as llama

from specd.drafts.layers import MLP, Linear, RMSNorm, _Lookup, draw, lookup, sharing


def test_norm_and_mlp_are_those_of_llama() -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    norm, mlp = RMSNorm(32, 1e-5), MLP(32, 48)
    draw(mlp, seed=1)
    theirs = llama.LlamaMLP(config)  # type: ignore[no-untyped-call]
    theirs.load_state_dict(mlp.state_dict())
    x = torch.randn(5, 32)
    torch.testing.assert_close(mlp(x), theirs(x))
    torch.testing.assert_close(norm(x), llama.LlamaRMSNorm(32, 1e-5)(x))
    assert mlp(x.bfloat16()).dtype == torch.bfloat16


def test_weights_are_drawn_by_their_seed_alone() -> None:
    drawn = []
    for around, seed in ((0, 3), (1, 3), (1, 4)):
        torch.manual_seed(around)
        mlp = MLP(32, 48)
        draw(mlp, seed)
        drawn.append(mlp.up_proj.weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert 0.015 < float(drawn[0].detach().std()) < 0.025


def test_a_bias_is_added_and_begins_at_zero() -> None:
    linear, x = Linear(4, 3, bias=True), torch.randn(5, 4)
    draw(linear, seed=1)
    assert torch.equal(linear(x), x @ linear.weight.T)
    assert linear.bias is not None
    with torch.no_grad():
        linear.bias.copy_(torch.arange(3.0))
    torch.testing.assert_close(linear(x), x @ linear.weight.T + torch.arange(3.0))
    assert linear(x.bfloat16()).dtype == torch.bfloat16
    assert Linear(4, 3).bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_that_share_a_rounded_weight_compute_what_others_do(dtype: torch.dtype) -> None:
    mlp, x = MLP(32, 48), torch.randn(5, 32).to(dtype).requires_grad_()
    draw(mlp, seed=1)

    def run() -> tuple[torch.Tensor, list[torch.Tensor], set[int]]:
        kept: set[int] = set()

        def keep(part: torch.Tensor) -> torch.Tensor:
            if part.numel() == 32 * 48:
                kept.add(part.data_ptr())
            return part

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda part: part):
            out = mlp(mlp(x))
        return out, list(torch.autograd.grad(out.float().square().sum(), list(mlp.parameters()))), kept

    apart, slopes, many = run()
    with sharing(mlp, dtype):
        together, shared, few = run()
    assert torch.equal(together, apart)
    assert all(part.dtype == torch.float32 for part in shared)
    for one, other in zip(shared, slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-2)
    assert (len(few), len(many)) == (3, 3 if dtype == torch.float32 else 6)
    assert mlp.up_proj.rounded is None


def test_rows_that_are_looked_up_and_their_gradient_are_those_of_an_embedding() -> None:
    ids, table = torch.randint(0, 7, (40, 3)), torch.randn(9, 4, requires_grad=True)
    up = torch.randn(40, 3, 4)
    as_on_a_gpu: torch.Tensor = _Lookup.apply(table, ids)  # type: ignore[no-untyped-call]
    wanted = F.embedding(ids, table)
    (gradient,) = torch.autograd.grad(wanted, table, up, retain_graph=True)
    for rows in (as_on_a_gpu, lookup(table, ids)):
        assert torch.equal(rows, wanted)
        torch.testing.assert_close(torch.autograd.grad(rows, table, up)[0], gradient)


@pytest.mark.gpu(1)
def test_the_gradient_of_a_table_is_the_same_each_time_on_a_gpu() -> None:
    """Few rows, each many times: there CUDA's own backward of an embedding is not."""
    table = torch.zeros(97, 24, device="cuda", requires_grad=True)
    ids, up = torch.randint(0, 97, (5000, 8), device="cuda"), torch.randn(5000, 8, 24, device="cuda")
    first, *more = (torch.autograd.grad(lookup(table, ids), table, up)[0] for _ in range(20))
    assert all(torch.equal(first, other) for other in more)
