"""The DFlash objective: anchors, blocks, shapes, and the whole loss against a plain rewrite of its definition."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from drafts import (
    CONFIG,
    CONTRACT,
    HIDDEN,
    LENGTHS,
    MASK,
    TARGET,
    VOCAB,
    deliver,
    make_batch,
    make_draft,
    parts,
    taps_of,
)
from specd.drafts.backbone.shape import draft_shape
from specd.drafts.base import TargetParts, Tuning
from specd.drafts.blocks import sample_anchors
from specd.drafts.dflash.objective import DFlash
from specd.drafts.flex import in_whole_tiles
from specd.drafts.layers import KeyValue
from specd.errors import ConfigError
from specd.protocol.batch import Batch, Delivery


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_flex_attention_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"draft\.attention=flex on cpu: .* use auto or sdpa"):
        make_draft(msgspec.structs.replace(CONFIG, attention="flex"))


def attend_alone(query: Tensor, block: KeyValue, context: KeyValue, window: int, causal: bool = False) -> Tensor:
    """A single block that sees all of its context within the window, and itself, or itself up to each token."""
    keys, values = (
        torch.cat(pair).transpose(0, 1).repeat_interleave(query.shape[1] // block[0].shape[1], 0)
        for pair in zip(context, block, strict=True)
    )
    length, rows = len(context[0]), len(query)
    distance = torch.arange(length, length + rows)[:, None] - torch.arange(length + rows)
    visible = distance < window if window else torch.ones_like(distance, dtype=torch.bool)
    visible = visible & (distance >= 0) if causal else visible
    return F.scaled_dot_product_attention(query.transpose(0, 1), keys, values, attn_mask=visible).transpose(0, 1)


def slow_loss(draft: DFlash, delivery: Delivery) -> tuple[Tensor, float, list[int], list[int]]:
    """The same loss, block by block and score by score, from the definition."""
    batch, shape, module = delivery.batch, draft.draft.shape, draft.draft
    total, weight = torch.zeros(()), 0.0
    dpace, alpha = draft.config.loss == "dpace", draft.config.dpace_alpha
    correct, counted = [0] * (shape.block_size - 1), [0] * (shape.block_size - 1)
    anchors = sample_anchors(
        batch.loss_mask, batch.lengths, batch.samples, batch.epoch, draft.seed, draft.config.num_anchors
    )
    start = 0
    for length, chosen in zip(batch.lengths.tolist(), anchors, strict=True):
        tokens = batch.tokens[start : start + length].astype(np.int64)
        mask = batch.loss_mask[start : start + length]
        for p in chosen.tolist():
            ids = torch.full((shape.block_size,), MASK)
            ids[0] = int(tokens[p])
            states = module(
                taps_of(delivery)[start : start + p].flatten(1),
                torch.arange(p),
                draft.embedding[ids],
                torch.arange(p, p + shape.block_size),
                attend_alone,
            )
            counting = [k for k in range(1, shape.block_size) if p + k < length and mask[p + k]]
            all_logits = {k: draft.lm_head @ states[k] for k in counting}
            logs = {k: all_logits[k].log_softmax(-1)[tokens[p + k]] for k in counting}
            reached = [
                math.prod(alpha + (1 - alpha) * logs[i].exp().item() for i in counting if i <= k) for k in counting
            ]
            for index, k in enumerate(counting):
                w = sum(reached[index:]) if dpace else math.exp(-(k - 1) / draft.decay)
                total = total - w * logs[k]
                weight += 0.0 if dpace else w
                counted[k - 1] += 1
                correct[k - 1] += int(all_logits[k].argmax() == tokens[p + k])
            weight += float(dpace and bool(counting))
        start += length
    return total, weight, correct, counted


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 5},
        {"sliding_window": 5, "sliding_causal": False},
        {"num_layers": 3, "sliding_window": 4, "full_layers": 1},
        {"loss": "dpace"},
        {"loss": "dpace", "dpace_alpha": 0.2, "block_size": 8},
    ],
)
def test_loss_and_gradients_equal_a_block_by_block_rewrite(changes: dict[str, Any]) -> None:
    config = msgspec.structs.replace(CONFIG, **changes)
    delivery = deliver(make_batch())
    fast, slow = make_draft(config), make_draft(config)
    loss = fast.loss(delivery)
    total, weight, correct, counted = slow_loss(slow, delivery)
    assert sum(counted) > 20
    torch.testing.assert_close(loss.sum, total, rtol=1e-5, atol=1e-4)
    assert loss.weight.item() == pytest.approx(weight, rel=1e-5)
    assert loss.metrics["correct"].tolist() == correct
    assert loss.metrics["counted"].tolist() == counted
    loss.sum.backward()  # type: ignore[no-untyped-call]
    total.backward()  # type: ignore[no-untyped-call]
    for (name, ours), theirs in zip(fast.module.named_parameters(), slow.module.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_a_sequence_gives_the_same_loss_alone_and_packed() -> None:
    draft, delivery = make_draft(), deliver(make_batch())
    alone, start = [], 0
    for index, length in enumerate(LENGTHS):
        cut = slice(start, start + length)
        batch = Batch(
            tokens=delivery.batch.tokens[cut],
            lengths=np.array([length], np.int32),
            loss_mask=delivery.batch.loss_mask[cut],
            samples=delivery.batch.samples[index : index + 1],
        )
        alone.append(draft.loss(Delivery(batch, taps_of(delivery)[cut])))
        start += length
    packed = draft.loss(delivery)
    torch.testing.assert_close(packed.sum, torch.stack([x.sum for x in alone]).sum(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(packed.weight, torch.stack([x.weight for x in alone]).sum())


@pytest.mark.parametrize("mask", [[False] * 6, [False, True, False, True, False, True]])
def test_a_batch_without_anchors_weighs_nothing_and_has_zero_gradients(mask: list[bool]) -> None:
    draft = make_draft()
    batch = make_batch((4, 2))
    batch = msgspec.structs.replace(batch, loss_mask=np.array(mask))
    loss = draft.loss(deliver(batch))
    loss.sum.backward()  # type: ignore[no-untyped-call]
    assert loss.sum.item() == 0.0
    assert loss.weight.item() == 0.0
    assert loss.metrics["counted"].sum() == 0
    for name, parameter in draft.module.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_no_block_sees_its_own_answer() -> None:
    """States at and after the first anchor do not change what its block predicts."""
    draft = make_draft(msgspec.structs.replace(CONFIG, num_anchors=1))
    batch = make_batch((20,), density=1.0)
    anchor = int(sample_anchors(batch.loss_mask, batch.lengths, batch.samples, 0, 0, 1)[0][0])
    delivery = deliver(batch)
    before = draft.loss(delivery).sum
    taps_of(delivery)[anchor:] += 1.0
    assert torch.equal(draft.loss(delivery).sum, before)
    taps_of(delivery)[anchor - 1] += 1.0
    assert not torch.equal(draft.loss(delivery).sum, before)


def test_training_overfits_one_batch_and_is_reproducible() -> None:
    runs: list[list[float]] = []
    for _ in range(2):
        torch.manual_seed(len(runs))
        draft, delivery = make_draft(seed=4), deliver(make_batch())
        optimizer = torch.optim.AdamW(draft.module.parameters(), lr=3e-3)
        losses = []
        for _ in range(40):
            loss = draft.loss(delivery)
            (loss.sum / loss.weight).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            losses.append((loss.sum / loss.weight).item())
        runs.append(losses)
    assert runs[0] == runs[1]
    assert runs[0][-1] < 0.5 * runs[0][0]


def test_bfloat16_forward_keeps_float32_masters() -> None:
    tied = parts()
    low = DFlash(CONFIG, tied._replace(lm_head=tied.lm_head.clone()), dtype=torch.bfloat16)
    delivery = deliver(make_batch())
    loss, exact = low.loss(delivery), make_draft().loss(delivery)
    loss.sum.backward()  # type: ignore[no-untyped-call]
    assert loss.sum.item() == pytest.approx(exact.sum.item(), rel=0.02)
    assert {p.dtype for p in low.module.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in low.module.parameters())


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch
def test_compiled_layers_give_the_same_loss_and_are_traced_once_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(
        "specd.drafts.backbone.network.compiled",
        functools.cache(lambda function, instead: torch.compile(function, dynamic=True, backend=counter)),
    )
    torch._dynamo.reset()
    config = msgspec.structs.replace(CONFIG, num_layers=3)
    drafts = [make_draft(config, tuning=Tuning(compiled=on)) for on in (True, False)]
    for seed, lengths in enumerate((LENGTHS, (30, 9), (5, 40, 3), (64, 64))):
        delivery = deliver(make_batch(lengths, seed=seed))
        results = []
        for draft in drafts:
            loss = draft.loss(delivery)
            loss.sum.backward()  # type: ignore[no-untyped-call]
            results.append((loss.sum, [parameter.grad for parameter in draft.module.parameters()]))
            draft.module.zero_grad()
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    # The context, and the two halves of a layer: the first layer's input has no gradient, that of the others has.
    assert sum(any(node.op == "call_function" for node in graph.graph.nodes) for graph in counter.graphs) == 5


@pytest.mark.parametrize("num_anchors", [5, 512])  # as many tiles of block tokens as of context, were it not for it
def test_what_is_compiled_meets_the_same_sizes_first_whatever_the_first_batch_is(
    monkeypatch: pytest.MonkeyPatch, num_anchors: int
) -> None:
    monkeypatch.setattr("specd.drafts.backbone.network.compiled", lambda function, instead: function)
    config = msgspec.structs.replace(CONFIG, num_anchors=num_anchors)
    met: list[list[tuple[int, int]]] = []
    for lengths in (LENGTHS, (64, 64)):
        draft, plain = (make_draft(config, tuning=Tuning(compiled=on)) for on in (True, False))
        sizes: list[tuple[int, int]] = []

        def note(_module: Any, inputs: tuple[Any, ...], sizes: list[tuple[int, int]] = sizes) -> None:
            sizes.append((len(inputs[0]), len(inputs[2])))

        draft.module.register_forward_pre_hook(note)
        delivery = deliver(make_batch(lengths))
        for one in (draft, plain):
            one.loss(delivery).sum.backward()  # type: ignore[no-untyped-call]
        for ours, theirs in zip(draft.module.parameters(), plain.module.parameters(), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            assert torch.equal(ours.grad, theirs.grad), "what was compiled for has left a gradient"
        draft.loss(delivery)
        met.append(sizes)
    assert met[0][0] == met[1][0], "the first batch shows"
    assert [len(sizes) for sizes in met] == [3, 3]
    context, block = met[0][0]
    assert in_whole_tiles(context) != in_whole_tiles(block)


def test_its_inputs_and_logits_are_those_of_its_target(tmp_path: Path) -> None:
    figures = {"embedding_scale": 5.0, "logit_scale": 0.25, "logit_softcap": 3.0}
    delivery = deliver(make_batch())
    settings = msgspec.structs.replace(CONFIG, loss="decay")
    plain = make_draft(settings)
    drawn = plain.draw(delivery.batch)
    tokens, positions, context, rows, labels, weights = (
        torch.from_numpy(np.asarray(column))
        for column in (drawn.tokens, drawn.positions, drawn.context_positions, drawn.rows, drawn.labels, drawn.weights)
    )
    noise = plain.embedding[tokens.long()] * 5.0
    states = plain.module(taps_of(delivery).flatten(1), context, noise, positions, plain.attention(drawn.layout))
    logits = 3.0 * torch.tanh(states[rows.long()] @ plain.lm_head.T * 0.25 / 3.0)
    wanted = (F.cross_entropy(logits, labels.long(), reduction="none") * weights).sum()
    wanted.backward()  # type: ignore[no-untyped-call]

    objective = DFlash(settings, parts(figures=figures))
    loss = objective.loss(delivery)
    loss.sum.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss.sum, wanted)
    for ours, theirs in zip(objective.module.parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)

    objective.export(tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    found = {key: config["dflash_config"][key] for key in config["dflash_config"].keys() - {"target_layer_ids"}}
    assert found == {
        "mask_token_id": MASK, "input_embedding_scale": 5.0, "output_multiplier": 0.25, "final_logit_softcapping": 3.0
    }  # fmt: skip
    assert config["logit_scale"] == 0.25
    table = load_file(tmp_path / "draft" / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(table, objective.embedding * 5.0)
    assert "the target's embedding times 5" in (tmp_path / "draft" / "README.md").read_text()
    plain.export(tmp_path / "plain")
    assert "embed_tokens.weight" not in load_file(tmp_path / "plain" / "model.safetensors")

    with pytest.raises(ConfigError, match="target tiny: its embedding is odd, so a draft would be trained on other"):
        DFlash(CONFIG, parts(figures={"odd_embedding": "its embedding is odd"}))
    assert DFlash(CONFIG, parts(figures={"odd_logits": "a bias"})).draft.shape.output_multiplier == 1.0


def test_what_does_not_fit_the_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="mask_token_id 97 is no token"):
        draft_shape(msgspec.structs.replace(CONFIG, mask_token_id=VOCAB), TARGET, (1, 3))
    with pytest.raises(ConfigError, match="no key 'hidden_size'"):
        draft_shape(CONFIG, {}, (1, 3))
    with pytest.raises(ConfigError, match=r"embedding of tiny is \[96, 32\]"):
        DFlash(CONFIG, TargetParts(CONTRACT, TARGET, torch.zeros(96, HIDDEN), torch.zeros(VOCAB, HIDDEN)))
    with pytest.raises(ConfigError, match="vocabulary 96"):
        make_draft(vocab_size=96)
