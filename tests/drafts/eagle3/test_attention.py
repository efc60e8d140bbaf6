"""Attention of a step: the plain path and flex_attention against each other, and the tiles a kernel visits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import specd.drafts.eagle3.attention as module
from dense_flex import dense_flex, noting
from drafts import make_batch
from specd.drafts.device import Ints
from specd.drafts.eagle3.attention import attention, flex_attention, merge, sequence_mask, tiles
from specd.drafts.eagle3.rows import Rows, in_tiles, rows_of
from specd.drafts.layers import KeyValue

CPU = torch.device("cpu")
STEPS = 4


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def whole(lengths: tuple[int, ...], density: float = 0.6, seed: int = 0) -> Rows:
    """Rows of a batch in whole tiles."""
    return in_tiles(rows_of(make_batch(lengths, density, seed), STEPS))


def random_states(rows: Rows, kv: int = 2, group: int = 2, dim: int = 16) -> list[Tensor]:
    """Queries, keys and values of the context, and those of three later steps."""
    generator, num_rows = torch.Generator().manual_seed(0), rows.queries[0].size
    sizes = [(num_rows, kv * group), *[(rows.starts.size, kv)] * 2, *[(num_rows, kv)] * 6]
    return [torch.randn(n, heads, dim, generator=generator) for n, heads in sizes]


def attended(flex: bool, rows: Rows, states: list[Tensor], steps: int, device: torch.device = CPU) -> Tensor:
    query, keys, values, *more = states
    later: list[KeyValue] = [(more[2 * step], more[2 * step + 1]) for step in range(steps)]
    attend = attention(flex, rows.queries[0], rows.starts, device)
    return attend(query, rows.queries[0], (keys, values), later)


def definition(rows: Ints, starts: Ints) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """One score at a time: bool [rows, tokens]."""
    seen = np.zeros((rows.size, starts.size), np.bool_)
    for place, row in enumerate(rows.tolist()):
        seen[place, starts[row] : row + 1] = True
    return seen


BATCHES = [((300, 31, 90), 0.6), ((1, 2, 400, 3, 150), 0.9), ((9,), 0.5), ((200, 200), 0.0)]


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize(("lengths", "density"), BATCHES)
def test_merged_attention_equals_the_plain_path_forward_and_backward(
    lengths: tuple[int, ...], density: float, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With flex_attention written out, because torch has no gradients of it here."""
    monkeypatch.setattr("torch.nn.attention.flex_attention.flex_attention", dense_flex)
    rows, results = whole(lengths, density), []
    for flex in (True, False):
        states = [x.requires_grad_() for x in random_states(rows)]
        out = attended(flex, rows, states, steps)
        out.square().sum().backward()  # type: ignore[no-untyped-call]
        results.append([out, *(x.grad for x in states[: 3 + 2 * steps])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("lengths", "density"), BATCHES)
def test_torchs_flex_attention_equals_the_plain_path(lengths: tuple[int, ...], density: float) -> None:
    """Forward only, see above; the GPU test below compares gradients."""
    rows = whole(lengths, density)
    for steps in (0, 3):
        states = random_states(rows)
        flex, plain = (attended(kind, rows, states, steps) for kind in (True, False))
        torch.testing.assert_close(flex, plain, atol=1e-5, rtol=1e-5)


def test_merging_keys_is_one_softmax_over_all_of_them() -> None:
    """Scores far apart, too, where one of the parts is nothing beside the other."""
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(5, 4, n, 8, generator=generator) for n in (1, 9, 9))
    for size in (1.0, 30.0, 300.0):
        scores = size * query @ keys[:, :, :6].mT * 8**-0.5
        found = (scores.softmax(-1) @ values[:, :, :6])[:, :, 0]
        rest = [[part[:, :, n] for n in (6, 7, 8)] for part in (keys, values)]
        merged = merge(size * query[:, :, 0], found, scores.logsumexp(-1)[:, :, 0], *rest)
        expected = F.scaled_dot_product_attention(size * query, keys, values)[:, :, 0]
        torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("lengths", "density"), [*BATCHES, ((700, 500, 20, 300), 0.02), ((1000,), 1.1)])
def test_a_mask_visits_every_visible_tile_and_takes_no_hidden_score_whole(
    lengths: tuple[int, ...], density: float
) -> None:
    rows = whole(lengths, density)
    truth = definition(rows.queries[0], rows.starts)
    partial, full = tiles(rows.queries[0], rows.starts)
    by_tile = truth.reshape(partial.shape[0], 128, partial.shape[1], 128)
    assert not (by_tile.any((1, 3)) & ~(partial | full)).any()
    assert not (partial & full).any()
    assert np.array_equal(by_tile.all((1, 3)), full)
    # What is visited for nothing lies between tiles that are seen.
    seen, visited = np.asarray(by_tile.any((1, 3))), partial | full
    for tile in range(len(seen)):
        places = np.flatnonzero(seen[tile])
        assert np.array_equal(np.flatnonzero(visited[tile]), np.arange(places[0], places[-1] + 1))
    mask = sequence_mask(rows.queries[0], rows.starts, CPU, copies=2)
    row, key = torch.arange(truth.shape[0])[:, None], torch.arange(truth.shape[1])[None]
    assert np.array_equal(mask.mask_mod(row, row, row, key).numpy(), truth)
    assert mask.shape == (2, 1, *truth.shape)
    for copy in mask.to_dense():
        assert np.array_equal(copy[0].numpy().astype(np.bool_), partial | full)


def test_flex_attention_is_traced_once_for_all_batches_with_lengths_known_to_be_whole_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new graph for each batch would compile for ever, and unknown lengths cost bound checks in the kernels."""
    known: list[bool] = []
    torch._dynamo.reset()
    monkeypatch.setattr(module, "_flex", torch.compile(module._flex, dynamic=True, backend=noting(known)))
    with torch.no_grad():
        # First one whose numbers of tiles are no number of heads: a compiler takes equal lengths for the same one.
        for lengths in ((1500, 700), (30,), (300, 31), (1, 700, 900), (256,), (1024, 1024)):
            rows = whole(lengths, 0.9)
            attend = flex_attention(rows.queries[0], rows.starts, CPU)
            query, *context = random_states(rows)[:3]
            attend(query, rows.queries[0], (context[0], context[1]), [])
    assert known == [True]


@pytest.mark.gpu(1)
@pytest.mark.usefixtures("few_compile_workers")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("group", "dim"), [(2, 64), (8, 128), (1, 16)])
def test_compiled_flex_attention_equals_the_plain_path(
    dtype: torch.dtype, tolerance: float, group: int, dim: int
) -> None:
    """Forward and gradients, over batches of changing size."""
    cuda = torch.device("cuda")
    for lengths, density in (((1500, 700), 0.9), *BATCHES):
        rows = whole(lengths, density)
        for steps in (0, 1, 3):
            results = []
            for flex in (True, False):
                states = [x.to(cuda, dtype).requires_grad_() for x in random_states(rows, 2, group, dim)]
                out = attended(flex, rows, states, steps, cuda)
                results.append([out, *torch.autograd.grad(out.square().sum(), states[: 3 + 2 * steps])])
            largest = max(float(part.float().norm()) for part in results[1])  # some gradients are zero
            for ours, theirs in zip(*results, strict=True):
                error = float((ours.float() - theirs.float()).norm())
                norm = float(theirs.float().norm()) or largest
                assert error <= tolerance * norm, (lengths, steps, error)
