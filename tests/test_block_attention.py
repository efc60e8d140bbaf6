"""Attention of packed blocks: plain and flex paths against the mask's definition, and the tiles a kernel visits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from specd.train.block_attention import BlockLayout, block_attention, block_mask, plain_attention, tiles


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def dense_mask(layout: BlockLayout, window: int) -> np.ndarray[Any, Any]:
    """The definition, one score at a time: bool [N, T + N]."""
    b, context, blocks = layout.block_size, layout.num_context, len(layout.anchors)
    seen = np.zeros((blocks * b, context + blocks * b), np.bool_)
    for m in range(blocks):
        for k in range(b):
            low = layout.starts[m]
            if window:
                low = max(low, layout.anchors[m] + k - window + 1)
            seen[m * b + k, low : layout.anchors[m]] = True
            seen[m * b + k, context + m * b : context + (m + 1) * b] = True
    return seen


def random_layout(rng: np.random.Generator, block_size: int, longest: int) -> BlockLayout:
    lengths = rng.integers(1, longest, 3)
    begins = np.cumsum(lengths) - lengths
    counts = [int(rng.integers(0, min(n, 8) + 1)) for n in lengths]
    counts[0] = max(counts[0], 1)
    anchors = [np.sort(rng.choice(n, c, replace=False)) + s for n, c, s in zip(lengths, counts, begins, strict=True)]
    return BlockLayout(
        starts=np.repeat(begins, counts),
        anchors=np.concatenate(anchors),
        block_size=block_size,
        num_context=int(lengths.sum()),
    )


def random_states(layout: BlockLayout, heads: int = 4, kv: int = 2, dim: int = 16) -> list[Tensor]:
    rows = len(layout.anchors) * layout.block_size
    generator = torch.Generator().manual_seed(0)
    sizes = [(rows, heads), (rows, kv), (rows, kv), (layout.num_context, kv), (layout.num_context, kv)]
    return [torch.randn(n, h, dim, generator=generator) for n, h in sizes]


def run_attention(attend: Any, states: list[Tensor], window: int) -> Tensor:
    query, own_k, own_v, context_k, context_v = states
    out: Tensor = attend(query, (own_k, own_v), (context_k, context_v), window)
    return out


def reference_attention(layout: BlockLayout, states: list[Tensor], window: int) -> Tensor:
    query, own_k, own_v, context_k, context_v = states
    groups = query.shape[1] // own_k.shape[1]
    keys, values = (
        torch.cat(pair).transpose(0, 1).repeat_interleave(groups, 0)
        for pair in ((context_k, own_k), (context_v, own_v))
    )
    mask = torch.from_numpy(dense_mask(layout, window))
    return F.scaled_dot_product_attention(query.transpose(0, 1), keys, values, attn_mask=mask).transpose(0, 1)


@pytest.mark.parametrize(("block_size", "window"), [(4, 0), (4, 6), (5, 0), (5, 7), (8, 8)])
def test_plain_attention_equals_the_masked_definition_forward_and_backward(block_size: int, window: int) -> None:
    for seed in range(4):
        layout = random_layout(np.random.default_rng(seed), block_size, 30)
        results = []
        for attend in (plain_attention(layout, torch.device("cpu")), None):
            states = [x.requires_grad_() for x in random_states(layout)]
            out = run_attention(attend, states, window) if attend else reference_attention(layout, states, window)
            out.square().sum().backward()  # type: ignore[no-untyped-call]
            results.append([out, *(x.grad for x in states)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [0, 40])
def test_flex_attention_equals_the_plain_path(window: int) -> None:
    """Forward only: torch has no backward of flex_attention on the CPU; the GPU test below compares gradients."""
    layout = random_layout(np.random.default_rng(1), 8, 150)
    states, cpu = random_states(layout), torch.device("cpu")
    flex = run_attention(block_attention("flex", layout, cpu), states, window)
    plain = run_attention(block_attention("auto", layout, cpu), states, window)
    torch.testing.assert_close(flex, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block_size", [4, 10, 16])
@pytest.mark.parametrize("window", [0, 20, 300])
def test_block_mask_visits_every_visible_tile_and_takes_no_hidden_score_whole(block_size: int, window: int) -> None:
    for seed in range(3):
        layout = random_layout(np.random.default_rng(seed), block_size, 700)
        truth = dense_mask(layout, window)
        partial, full = tiles(layout, window)
        rows, keys = truth.shape
        grown = np.zeros((partial.shape[0] * 128, partial.shape[1] * 128), np.bool_)
        grown[:rows, :keys] = truth
        by_tile = grown.reshape(partial.shape[0], 128, partial.shape[1], 128)
        assert not (by_tile.any((1, 3)) & ~(partial | full)).any()
        assert not (partial & full).any()
        for row, key in zip(*np.nonzero(full), strict=True):
            assert truth[row * 128 : (row + 1) * 128, key * 128 : (key + 1) * 128].all()
        mask = block_mask(layout, window, torch.device("cpu"))
        row, key = torch.arange(rows)[:, None], torch.arange(keys)[None]
        assert np.array_equal(mask.mask_mod(row, row, row, key).numpy(), truth)
        assert np.array_equal(mask.to_dense()[0, 0].numpy().astype(np.bool_), partial | full)


@pytest.fixture
def own_compiler() -> Iterator[None]:
    """Compile in this process: torch's compile workers outlive the tests."""
    import torch._inductor.config

    with torch._inductor.config.patch(compile_threads=1):
        yield


@pytest.mark.gpu(1)
@pytest.mark.usefixtures("own_compiler")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("window", [0, 40])
def test_compiled_flex_attention_equals_the_plain_path(dtype: torch.dtype, tolerance: float, window: int) -> None:
    """Forward and gradients, over layouts of changing size, a single block without context among them."""
    cuda, zero = torch.device("cuda"), np.zeros(1, np.int64)
    layouts = [random_layout(np.random.default_rng(seed), size, 700) for seed, size in enumerate((16, 16, 16, 8, 10))]
    for layout in (*layouts, BlockLayout(starts=zero, anchors=zero, block_size=16, num_context=33)):
        results = []
        for kind in ("flex", "sdpa"):
            states = [x.to(cuda, dtype).requires_grad_() for x in random_states(layout, 8, 2, 64)]
            out = run_attention(block_attention(kind, layout, cuda), states, window)
            out.square().sum().backward()  # type: ignore[no-untyped-call]
            results.append([out, *(x.grad for x in states)])
        for flex, plain in zip(*results, strict=True):
            error = (flex.float() - plain.float()).norm()
            assert error <= tolerance * plain.float().norm(), (layout, float(error))
