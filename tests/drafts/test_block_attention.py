"""Attention of packed blocks: plain and flex paths against the mask's definition, and the tiles a kernel visits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import specd.drafts.block_attention
from dense_flex import noting
from specd.drafts.block_attention import (
    BlockLayout,
    block_attention,
    block_mask,
    flex_attention,
    plain_attention,
    tiles,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def dense_mask(layout: BlockLayout, window: int, context: int = 0, causal: bool = False) -> np.ndarray[Any, Any]:
    """The definition, one score at a time: bool [N, T + N]. context: where the keys of blocks begin, 0 for behind T."""
    b, blocks = layout.block_size, len(layout.anchors)
    context = context or layout.num_context
    seen = np.zeros((blocks * b, context + blocks * b), np.bool_)
    for m in range(blocks):
        for k in range(b):
            low = layout.starts[m]
            if window:
                low = max(low, layout.anchors[m] + k - window + 1)
            seen[m * b + k, low : layout.anchors[m]] = True
            seen[m * b + k, context + m * b : context + m * b + (k + 1 if causal else b)] = True
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


def run_attention(attend: Any, states: list[Tensor], window: int, causal: bool = False) -> Tensor:
    query, own_k, own_v, context_k, context_v = states
    out: Tensor = attend(query, (own_k, own_v), (context_k, context_v), window, causal)
    return out


def reference_attention(layout: BlockLayout, states: list[Tensor], window: int, causal: bool = False) -> Tensor:
    query, own_k, own_v, context_k, context_v = states
    groups = query.shape[1] // own_k.shape[1]
    keys, values = (
        torch.cat(pair).transpose(0, 1).repeat_interleave(groups, 0)
        for pair in ((context_k, own_k), (context_v, own_v))
    )
    mask = torch.from_numpy(dense_mask(layout, window, causal=causal))
    return F.scaled_dot_product_attention(query.transpose(0, 1), keys, values, attn_mask=mask).transpose(0, 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("block_size", "window"), [(4, 0), (4, 6), (5, 0), (5, 7), (8, 8)])
def test_plain_attention_equals_the_masked_definition_forward_and_backward(
    block_size: int, window: int, causal: bool
) -> None:
    for seed in range(4):
        layout = random_layout(np.random.default_rng(seed), block_size, 30)
        results = []
        for attend in (plain_attention(layout, torch.device("cpu")), None):
            states = [x.requires_grad_() for x in random_states(layout)]
            if attend:
                out = run_attention(attend, states, window, causal)
            else:
                out = reference_attention(layout, states, window, causal)
            out.square().sum().backward()  # type: ignore[no-untyped-call]
            results.append([out, *(x.grad for x in states)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("window", "causal"), [(0, False), (40, False), (40, True)])
def test_flex_attention_equals_the_plain_path(window: int, causal: bool) -> None:
    """Forward only: torch has no backward of flex_attention on the CPU; the GPU test below compares gradients."""
    cpu = torch.device("cpu")
    for seed, longest in ((1, 150), (2, 12), (3, 400)):
        layout = random_layout(np.random.default_rng(seed), 8, longest)
        states = random_states(layout)
        plain = run_attention(block_attention("auto", layout, cpu), states, window, causal)
        for spread in (True, False):
            flex = run_attention(block_attention("flex", layout, cpu, spread), states, window, causal)
            torch.testing.assert_close(flex, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block_size", [4, 10, 16, 256])
@pytest.mark.parametrize(("window", "causal"), [(0, False), (20, False), (300, False), (20, True), (300, True)])
def test_block_mask_visits_every_visible_tile_and_takes_no_hidden_score_whole(
    block_size: int, window: int, causal: bool
) -> None:
    for seed in range(3):
        layout = random_layout(np.random.default_rng(seed), block_size, 700)
        context = max(2, -(-layout.num_context // 128)) * 128
        truth = dense_mask(layout, window, context, causal)
        partial, full = tiles(layout, window, causal)
        rows, keys = truth.shape
        grown = np.zeros((partial.shape[0] * 128, partial.shape[1] * 128), np.bool_)
        grown[:rows, :keys] = truth
        by_tile = grown.reshape(partial.shape[0], 128, partial.shape[1], 128)
        assert not (by_tile.any((1, 3)) & ~(partial | full)).any()
        assert not (partial & full).any()
        assert not (partial | full)[-(-rows // 128) :].any()
        for row, key in zip(*np.nonzero(full), strict=True):
            assert truth[row * 128 : (row + 1) * 128, key * 128 : (key + 1) * 128].all()
        mask = block_mask(layout, window, torch.device("cpu"), copies=2, causal=causal)
        row, key = torch.arange(len(grown))[:, None], torch.arange(grown.shape[1])[None]
        assert np.array_equal(mask.mask_mod(row, row, row, key).numpy(), grown)
        assert mask.shape == (2, 1, *grown.shape)
        for copy in mask.to_dense():
            assert np.array_equal(copy[0].numpy().astype(np.bool_), partial | full)


@pytest.mark.parametrize("spread", [True, False])
def test_flex_attention_is_traced_once_for_all_layouts_with_lengths_known_to_be_whole_tiles(
    spread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new graph for each batch would compile for ever, and unknown lengths cost bound checks in the kernels."""
    known: list[bool] = []
    torch._dynamo.reset()
    kernel = torch.compile(specd.drafts.block_attention._flex, dynamic=True, backend=noting(known))
    monkeypatch.setattr("specd.drafts.block_attention._flex", kernel)
    with torch.no_grad():
        # First one whose numbers of tiles are no number of heads: a compiler takes equal lengths for the same one.
        wide = BlockLayout(starts=np.zeros(60, np.int64), anchors=np.arange(60) * 20, block_size=16, num_context=1500)
        small = [random_layout(np.random.default_rng(seed), 16, size) for seed, size in enumerate((700, 20, 150, 40))]
        for layout in (wide, *small):
            attend = flex_attention(layout, torch.device("cpu"), spread)
            for window, causal in ((0, False), (40, False), (40, True)):
                run_attention(attend, random_states(layout), window, causal)
    assert known == [True]


@pytest.mark.gpu(1)
@pytest.mark.usefixtures("few_compile_workers")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    ("dim", "window", "causal", "spread"),
    [
        (64, 0, False, True),
        (64, 40, False, True),
        (64, 40, True, True),
        (64, 0, False, False),
        (128, 0, False, True),
        (128, 40, True, True),
    ],
)
def test_compiled_flex_attention_equals_the_plain_path(
    dtype: torch.dtype, tolerance: float, dim: int, window: int, causal: bool, spread: bool
) -> None:
    """Forward and gradients, over layouts of changing size, a single block without context among them.

    Kernels for heads of 128 in 16 bits have options of their own.
    """
    cuda, zero = torch.device("cuda"), np.zeros(1, np.int64)
    layouts = [random_layout(np.random.default_rng(seed), size, 700) for seed, size in enumerate((16, 16, 16, 8, 10))]
    for layout in (*layouts, BlockLayout(starts=zero, anchors=zero, block_size=16, num_context=33)):
        results = []
        for kind in ("flex", "sdpa"):
            states = [x.to(cuda, dtype).requires_grad_() for x in random_states(layout, 8, 2, dim)]
            out = run_attention(block_attention(kind, layout, cuda, spread), states, window, causal)
            out.square().sum().backward()  # type: ignore[no-untyped-call]
            results.append([out, *(x.grad for x in states)])
        for flex, plain in zip(*results, strict=True):
            error = (flex.float() - plain.float()).norm()
            assert error <= tolerance * plain.float().norm(), (layout, float(error))
