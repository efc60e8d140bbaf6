"""The EAGLE-3 loss is what its definition says, with its gradients, whatever is packed together."""

from __future__ import annotations

import functools
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from dense_flex import dense_flex
from drafts import make_batch
from eagle import CONFIG, COUNTS, deliver, make_eagle, parts, reference
from specd.drafts.eagle3.attention import merge
from specd.drafts.eagle3.objective import Eagle3, made_up
from specd.drafts.eagle3.rows import in_tiles, rows_of
from specd.drafts.eagle3.settings import Eagle3Config
from specd.errors import ConfigError
from specd.protocol.batch import Delivery


def gradients(objective: Eagle3, total: torch.Tensor) -> dict[str, torch.Tensor]:
    total.backward()  # type: ignore[no-untyped-call]
    found = {
        name: weight.grad.clone() for name, weight in objective.module.named_parameters() if weight.grad is not None
    }
    objective.module.zero_grad()
    return found


def check_definition(objective: Eagle3, delivery: Delivery) -> None:
    """Loss, weight, counts and every gradient of a batch that has predictions."""
    total, counted, correct = reference(objective, delivery)
    assert counted[0] > 2
    wanted = gradients(objective, total)
    loss = objective.loss(delivery)
    torch.testing.assert_close(loss.sum.detach(), total.detach(), rtol=1e-5, atol=1e-5)
    assert loss.weight == counted[0]
    assert loss.metrics["counted"].tolist() == counted.tolist()
    assert loss.metrics["correct"].tolist() == correct.tolist()
    found = gradients(objective, loss.sum)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert float((gradient - wanted[name]).norm() / wanted[name].norm()) < 2e-5, name


@pytest.mark.parametrize(
    ("settings", "target"),
    [
        ({}, {}),
        ({"norm_output": True, "fc_norm": True}, {}),
        ({"draft_vocab_size": 0, "num_steps": 7}, {}),
        ({"num_heads": 2, "num_kv_heads": 1, "loss_decay": 1.0}, {}),
        ({}, {"figures": {"logit_scale": 0.25}}),
        ({}, {"figures": {"logit_scale": 2.0, "logit_softcap": 3.0}}),
    ],
)
@pytest.mark.parametrize(("lengths", "density"), [((30,), 0.85), ((11, 1, 2, 17, 3), 0.8)])
def test_it_is_its_definition(
    settings: dict[str, Any], target: dict[str, Any], lengths: tuple[int, ...], density: float
) -> None:
    objective = make_eagle(msgspec.structs.replace(CONFIG, **settings), **target)
    delivery = deliver(make_batch(lengths, density))
    check_definition(objective, delivery)


@pytest.mark.parametrize(
    "shape",
    [
        {"norm_before_fc": True, "norm_output": True},
        {"norm_before_residual": True},
        {"attention_bias": True},
    ],
)
def test_what_only_drafts_of_others_have_is_its_definition_too(shape: dict[str, Any]) -> None:
    objective, delivery = make_eagle(shape=shape), deliver(make_batch((11, 2, 9)))
    check_definition(objective, delivery)


def test_other_sequences_of_a_batch_are_never_seen() -> None:
    """Neither their states nor their tokens reach a loss, at any step, to the bit."""
    objective, batch = make_eagle(), make_batch((9, 12))
    batch.loss_mask[9:] = False
    delivery = deliver(batch)
    before = objective.loss(delivery).sum.detach()
    assert delivery.taps is not None
    assert delivery.final is not None
    delivery.taps[9:], delivery.final[9:] = 1e3, -1e3
    batch.tokens[9:] = 0
    assert torch.equal(objective.loss(delivery).sum.detach(), before)


def test_a_last_token_teaches_nothing() -> None:
    """Its final state predicts what is not in the text."""
    objective, batch = make_eagle(), make_batch((8,), density=1.1)
    delivery = deliver(batch)
    before = objective.loss(delivery)
    assert delivery.final is not None
    delivery.final[-1] = 1e3
    assert torch.equal(objective.loss(delivery).sum, before.sum)
    teachable = np.isin(
        (delivery.final[:-1] @ objective.lm_head.T).argmax(-1).numpy(), objective.draft.vocabulary.numpy()
    )
    assert before.metrics["counted"].tolist() == [teachable[1 + step : 7].sum() for step in range(4)]


def test_no_prediction_reaches_every_weight_with_an_exact_zero() -> None:
    objective, batch = make_eagle(), make_batch((5, 1, 3), density=0)
    loss = objective.loss(deliver(batch))
    assert (float(loss.sum.detach()), float(loss.weight)) == (0.0, 0.0)
    found = gradients(objective, loss.sum)
    assert found.keys() == dict(objective.module.named_parameters()).keys()
    assert not any(gradient.any() for gradient in found.values())


def test_the_chunk_of_the_loss_changes_nothing() -> None:
    delivery = deliver(make_batch((23, 9)))
    sums = []
    for chunk in (1, 4, 1000):
        objective = make_eagle(msgspec.structs.replace(CONFIG, loss_chunk=chunk))
        loss = objective.loss(delivery)
        sums.append((loss.sum.detach(), gradients(objective, loss.sum)))
    for total, found in sums[1:]:
        torch.testing.assert_close(total, sums[0][0])
        for name, gradient in found.items():
            assert float((gradient - sums[0][1][name]).norm() / gradient.norm()) < 1e-5, name


def test_the_vocabulary_is_that_of_the_labels() -> None:
    objective = make_eagle()
    chosen = objective.draft.vocabulary.numpy()
    assert chosen.size == 60
    assert COUNTS[chosen].min() >= np.delete(COUNTS, chosen).max()
    assert objective.facts()["draft vocabulary"] == f"60 of 97, {COUNTS[chosen].sum() / COUNTS.sum():.1%} of labels"


def test_what_cannot_be_taught_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected label counts of the training data"):
        Eagle3(CONFIG, parts()._replace(label_counts=None))
    with pytest.raises(ConfigError, match="target tiny: its lm_head has a bias: a draft cannot learn its distribution"):
        make_eagle(figures={"odd_logits": "its lm_head has a bias"})
    with pytest.raises(ConfigError, match="covers 8% of the labels: expected at least 50%"):
        Eagle3(Eagle3Config(draft_vocab_size=8), parts()._replace(label_counts=np.full(97, 5)))


def flexed(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Eagle3:
    """An objective that computes as on a GPU, but for kernels: flex_attention written out, rows in whole tiles."""
    monkeypatch.setattr("torch.nn.attention.flex_attention.flex_attention", dense_flex)
    objective = make_eagle(msgspec.structs.replace(CONFIG, **settings))
    objective._flex = objective._in_tiles = True
    return objective


@pytest.mark.parametrize("settings", [{}, {"norm_output": True, "num_steps": 7}, {"num_heads": 2, "num_kv_heads": 1}])
@pytest.mark.parametrize(("lengths", "density"), [((30,), 0.85), ((11, 1, 2, 17, 3), 0.8), ((140, 3, 150), 0.5)])
def test_as_on_a_gpu_it_is_the_same(
    settings: dict[str, Any], lengths: tuple[int, ...], density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery = deliver(make_batch(lengths, density))
    plain = make_eagle(msgspec.structs.replace(CONFIG, **settings))
    wanted = plain.loss(delivery)
    objective = flexed(settings, monkeypatch)
    loss = objective.loss(delivery)
    torch.testing.assert_close(loss.sum.detach(), wanted.sum.detach(), rtol=1e-5, atol=1e-5)
    assert loss.weight == wanted.weight
    assert all(loss.metrics[name].tolist() == wanted.metrics[name].tolist() for name in ("counted", "correct"))
    found, expected = gradients(objective, loss.sum), gradients(plain, wanted.sum)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert float((gradient - expected[name]).norm() / expected[name].norm()) < 2e-5, name


def test_as_on_a_gpu_no_prediction_is_an_exact_zero_for_every_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = flexed({}, monkeypatch)
    loss = objective.loss(deliver(make_batch((5, 1, 3), density=0)))
    assert (float(loss.sum.detach()), float(loss.weight)) == (0.0, 0.0)
    found = gradients(objective, loss.sum)
    assert found.keys() == dict(objective.module.named_parameters()).keys()
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch
def test_nothing_is_compiled_after_warming_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are counted, not made into kernels; those of flex_attention itself: see test_attention."""
    graphs: list[torch.fx.GraphModule] = []

    def note(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    made = functools.cache(lambda function, _instead: torch.compile(function, dynamic=True, backend=note))
    monkeypatch.setattr("specd.drafts.eagle3.model.compiled", made)
    monkeypatch.setattr("specd.drafts.eagle3.attention.merge", made(merge, ""))
    monkeypatch.setattr("specd.drafts.eagle3.objective.COMPILED_ROWS", 5)  # in less time
    monkeypatch.setattr("specd.drafts.eagle3.objective.COMPILED_CONTEXT", 7)
    objective = flexed({"num_steps": 7}, monkeypatch)
    objective.draft.compiled = objective._cold = True
    before = [parameter.detach().clone() for parameter in objective.module.parameters()]
    objective.warm_up(torch.float32)
    assert all(torch.equal(old, new) for old, new in zip(before, objective.module.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in objective.module.parameters())
    warmed = len(graphs)
    assert warmed == 3 + 6  # before and behind the attention, queries, and an end for each number of steps behind it
    rng = np.random.default_rng(0)
    for seed in range(20):
        lengths = tuple(rng.integers(1, 400, rng.integers(1, 4)).tolist())
        loss = objective.loss(deliver(make_batch((*lengths, 3), density=float(rng.random()), seed=seed)))
        loss.sum.backward()  # type: ignore[no-untyped-call]
    assert len(graphs) == warmed


def test_flex_attention_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"draft\.attention=flex on cpu: .* use auto or sdpa"):
        make_eagle(msgspec.structs.replace(CONFIG, attention="flex"))


@pytest.mark.parametrize(("num_heads", "head_dim"), [(17, 8), (24, 16), (32, 128)])
def test_a_made_up_batch_has_sizes_like_nothing_else(num_heads: int, head_dim: int) -> None:
    shape = msgspec.structs.replace(
        make_eagle().draft.shape, num_heads=num_heads, num_kv_heads=1, head_dim=head_dim, hidden_size=17 * 128
    )
    batch, (rows, context) = made_up(shape)
    filled = in_tiles(rows_of(batch, 4))
    assert (filled.queries[0].size, filled.starts.size, batch.num_tokens) == (rows, context, context)
    tiles = {rows // 128, context // 128}
    assert len(tiles | {rows, context}) == 4
    assert not (tiles | {rows, context}) & {num_heads, head_dim, 17 * 128, num_heads * head_dim, head_dim // 2}
