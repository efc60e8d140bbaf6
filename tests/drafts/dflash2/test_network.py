"""The DFlash2 network: a DFlash at first, convolutions that stay within a block, shapes that cannot be."""

from __future__ import annotations

import functools
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from dflash2 import CONFIG, make_dflash2, strong
from drafts import CONFIG as DFLASH
from drafts import HIDDEN, deliver, make_batch, make_draft
from specd.drafts.base import Tuning
from specd.drafts.block_attention import BlockLayout, plain_attention
from specd.drafts.dflash2.network import ConvolvedLayer, Mix, Selector
from specd.errors import ConfigError


def test_it_begins_as_the_dflash_of_its_seed() -> None:
    config = msgspec.structs.replace(DFLASH, block_size=CONFIG.block_size, loss="dpace")
    plain, fresh = make_draft(config, seed=4), make_dflash2(seed=4)
    weights = fresh.module.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in plain.module.state_dict().items())
    delivery = deliver(make_batch())
    alone = make_dflash2(msgspec.structs.replace(CONFIG, selector_weight=0.0), seed=4)
    one, other = plain.loss(delivery), alone.loss(delivery)
    assert torch.equal(one.sum, other.sum)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.metrics["correct"], other.metrics["unary_correct"])
    one.sum.backward()  # type: ignore[no-untyped-call]
    other.sum.backward()  # type: ignore[no-untyped-call]
    gradients = dict(alone.module.named_parameters())
    for name, weight in plain.module.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name].grad, msg=name)
    selector = fresh.module.get_submodule("candidate_selector")
    assert isinstance(selector, Selector)
    assert not selector.successor_codebook.any()
    assert selector.predecessor_codebook.std().item() == pytest.approx(0.02, rel=0.2)
    first = plain.draft.fc.weight.flatten()[: selector.predecessor_codebook.numel()]
    assert not torch.equal(first, selector.predecessor_codebook.flatten()), "numbers that the backbone has"


def test_of_a_fresh_selector_the_successors_move_first() -> None:
    objective = make_dflash2()
    objective.loss(deliver(make_batch())).sum.backward()  # type: ignore[no-untyped-call]
    selector = objective.module.get_submodule("candidate_selector")
    found = {name: bool(part.grad is not None and part.grad.any()) for name, part in selector.named_parameters()}
    assert found == {
        "predecessor_codebook": False, "successor_codebook": True, "hidden_projection.weight": False
    }  # fmt: skip


@pytest.mark.parametrize("taps", [1, 2, 4])
def test_a_convolution_is_its_definition(taps: int) -> None:
    objective = strong(make_dflash2(msgspec.structs.replace(CONFIG, conv_kernel_size=taps)))
    layer = objective.draft.layers[0]
    assert isinstance(layer, ConvolvedLayer)
    conv, group = layer.mlp_conv, CONFIG.conv_group_size
    x = torch.randn(3 * CONFIG.block_size, HIDDEN, generator=torch.Generator().manual_seed(1))
    entered, kernels = conv.enter(x)
    left = conv.leave(x, kernels)
    asked = (x @ conv.kernel_projection.weight.T).view(len(x), 2, taps, -1)
    for side, found in enumerate((entered, left)):
        for row in range(len(x)):
            wanted = torch.zeros(HIDDEN)
            for tap in range(min(taps, row % CONFIG.block_size + 1)):
                kernel = conv.base_kernel[side, tap] + asked[row, side, tap].repeat_interleave(group)
                wanted += kernel * x[row - tap]
            torch.testing.assert_close(found[row], wanted, rtol=1e-5, atol=1e-5)


def test_blocks_do_not_touch() -> None:
    objective = strong(make_dflash2())
    size, device = CONFIG.block_size, torch.device("cpu")
    layout = BlockLayout(starts=np.zeros(3, np.int64), anchors=np.array([2, 4, 6]), block_size=size, num_context=9)
    taps = torch.randn(9, 3 * HIDDEN, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(3 * size, HIDDEN, generator=torch.Generator().manual_seed(2))
    places = torch.cat([torch.arange(first, first + size) for first in (2, 4, 6)])
    attend = plain_attention(layout, device)
    states = objective.draft(taps, torch.arange(9), noise, places, attend)
    noise[size : 2 * size] += 1.0
    changed = objective.draft(taps, torch.arange(9), noise, places, attend)
    same = (states == changed).all(-1).view(3, size).all(-1)
    assert same.tolist() == [True, False, True]


def test_compilers_know_how_long_a_block_is() -> None:
    """Else every kernel divides sizes to find out, and every call is guarded by what they have to be."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(x: torch.Tensor, base: torch.Tensor, asked: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mixed = Mix.apply(x, base, asked, 16)  # type: ignore[no-untyped-call]
        return torch.autograd.grad(mixed.sum(), (x, base, asked))

    shapes = ((6 * 16, 12), (2, 12), (6 * 16, 2, 4))
    graph = make_fx(step, tracing_mode="symbolic")(*(torch.randn(shape, requires_grad=True) for shape in shapes)).graph
    values = [node.meta["val"] for node in graph.nodes if "val" in node.meta]
    blocks = {str(part.shape[1]) for part in values if isinstance(part, torch.Tensor) and part.ndim == 4}
    assert blocks == {"16", "15", "2"}  # rows of a block, all but its last or first, taps of its kernels


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch
def test_compiled_layers_give_the_same_loss_and_are_traced_once_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(
        "specd.drafts.backbone.network.compiled",
        functools.cache(lambda function, instead: torch.compile(function, dynamic=True, backend=counter)),
    )
    torch._dynamo.reset()
    drafts = [strong(make_dflash2(tuning=Tuning(compiled=on))) for on in (True, False)]
    for seed, lengths in enumerate(((11, 1, 17, 6), (30, 9), (64, 64))):
        delivery = deliver(make_batch(lengths, seed=seed))
        results: list[Any] = []
        for draft in drafts:
            loss = draft.loss(delivery)
            loss.sum.backward()  # type: ignore[no-untyped-call]
            results.append((loss.sum, [parameter.grad for parameter in draft.module.parameters()]))
            draft.module.zero_grad()
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    # As of a DFlash: the context, and the two halves of a layer, the first layer's without a gradient of its input.
    assert sum(any(node.op == "call_function" for node in graph.graph.nodes) for graph in counter.graphs) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_group_size": 5}, "conv_group_size 5 does not divide the hidden size 32"),
        ({"selector_top_k": 98}, "selector_top_k 98 is more than the vocabulary of 97"),
        ({"conv_kernel_size": 6}, "conv_kernel_size 6 is longer than a block of 5 tokens"),
        ({"selector_rank": 0}, "selector_rank 0 and selector_top_k 30: expected positive"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_dflash2(msgspec.structs.replace(CONFIG, **changes))
