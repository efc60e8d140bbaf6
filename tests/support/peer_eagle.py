"""EAGLE-3 as SpecForge and Speculators train it, on the weights and the batches of specd's own objective.

They count other rows: SpecForge where the token that a row reads is a label, Speculators where the one it predicts is,
whether the draft can guess it or not. So each is given the labels with which it counts the rows that specd counts.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from peers import peer
from specd.drafts.eagle3.objective import Eagle3
from specd.protocol.batch import Delivery


class Result(NamedTuple):
    """total: weighted sum over predictions. counted, correct: at each step, None where a peer asks for another thing.

    gradients: of `total`, by specd's names.
    """

    total: float
    counted: list[int]
    correct: list[int] | None
    gradients: dict[str, Tensor]


def of_specd(objective: Eagle3, delivery: Delivery) -> Result:
    """What specd says itself."""
    loss = objective.loss(delivery)
    counted, correct = (loss.metrics[key].int().tolist() for key in ("counted", "correct"))
    return _result(objective, loss.sum, counted, correct, objective.module)


def of_specforge(objective: Eagle3, delivery: Delivery, *, compact: bool = False) -> Result:
    """Its OnlineEagle3Model, sequences side by side. compact: its teacher never has all logits of the target."""
    shape = objective.draft.shape
    assert not shape.norm_output, "SpecForge has another meaning for it"
    module, reference = peer("specforge.algorithms.eagle3.model"), peer("specforge.core.loss")._compute_loss
    counted: list[int] = []

    def apply(logits: Tensor, teacher: Tensor, mask: Tensor) -> Any:
        """In place of a GPU kernel: what SpecForge tests that kernel with."""
        counted.append(int(mask.sum()))
        return reference(logits, teacher, mask)

    module.LogSoftmaxLoss = types.SimpleNamespace(apply=apply)
    draft = peer("specforge.modeling.draft.llama3_eagle").LlamaForCausalLMEagle3(layer_config(objective))
    take(draft, objective)
    shifted = functools.partial(peer("specforge.utils").padding, left=False)
    rows = [{**one, "attention_mask": torch.ones_like(one["loss_mask"])} for one in _sequences(delivery)]
    wide = {name: nn.utils.rnn.pad_sequence([one[name] for one in rows], batch_first=True) for name in rows[0]}
    labels = shifted(wide["loss_mask"])
    final = shifted(wide["verifier_last_hidden_states"])
    teacher: dict[str, Any] = {"target": final @ objective.lm_head.T}
    if compact:
        teacher = {"target": None, "target_hidden_for_compact": final, "target_head_weight": objective.lm_head}
    losses, _, _, correct, *_ = module.OnlineEagle3Model(draft, length=shape.num_steps)(
        input_ids=shifted(wide["input_ids"]),
        attention_mask=wide["attention_mask"],
        loss_mask=(labels & shifted(labels))[..., None].int(),
        hidden_states=wide["hidden_states"],
        **teacher,
    )
    # A mean is over all tokens, also over those that are there for the width alone.
    total = _weighed(objective, [loss * labels.numel() for loss in losses])
    return _result(objective, total, counted, [int(step) for step in correct], draft)


def of_speculators(objective: Eagle3, delivery: Delivery) -> Result:
    """Its Eagle3DraftModel, sequences one after the other, each but the first with num_steps prompt tokens at least."""
    shape, core = objective.draft.shape, peer("speculators.models.eagle3.core")
    settings = peer("speculators.models.eagle3").Eagle3SpeculatorConfig(
        transformer_layer_config=layer_config(objective, attn_implementation="eager"),
        draft_vocab_size=shape.draft_vocab_size,
        norm_output=shape.norm_output,
        norm_before_fc=shape.norm_before_fc,
        norm_before_residual=shape.norm_before_residual,
        fc_norm=shape.fc_norm,
    )
    model = core.Eagle3DraftModel(config=settings)
    take(model, objective)
    model.verifier_norm = nn.Identity()  # final states are normed already
    create_mask = peer("speculators.models.attention").create_float_mask
    model._create_mask_fn = functools.partial(create_mask, dtype=torch.float32)

    rows: list[dict[str, Tensor]] = []
    entropy = torch.zeros(shape.num_steps)
    for number, one in enumerate(_sequences(delivery)):
        labels, teacher = one["loss_mask"], one["verifier_last_hidden_states"] @ objective.lm_head.T
        inside = torch.isin(teacher.argmax(-1), objective.draft.vocabulary)
        one["loss_mask"] = labels & torch.cat((labels[1:], labels.new_zeros(1))) & inside
        assert not (number and one["loss_mask"][1 : shape.num_steps].any()), "it would teach the sequence before"
        own = torch.special.entr(teacher[:, objective.draft.vocabulary].softmax(-1)).sum(-1) * one["loss_mask"]
        entropy += torch.stack([own[1 + step :].sum() for step in range(shape.num_steps)])
        size = torch.tensor(labels.shape)
        shifted = peer("speculators.models.eagle3.data").shift_batch(
            {**one, "lengths": size, "position_ids": torch.arange(labels.numel())}
        )
        rows.append({**shifted, "document_ids": torch.full_like(shifted["input_ids"], number)})
    packed = {name: torch.cat([one[name] for one in rows])[None] for name in rows[0] if name != "lengths"}

    steps: list[Tensor] = []
    measure = core.compute_metrics

    def kept(*given: Any, **named: Any) -> Any:
        """A step's loss on its own, before it is added to the others."""
        loss, metrics = measure(*given, **named)
        steps.append(loss)
        return loss, metrics

    core.compute_metrics = kept
    try:
        kl = peer("speculators.losses").resolve_loss_config("kl_div", "eager")
        metrics = model(**packed, ttt_steps=shape.num_steps, loss_config=kl)[2]
    finally:
        core.compute_metrics = measure
    counted = [metrics[f"full_acc_{step}_total"] for step in range(shape.num_steps)]
    # A mean is over the rows of its step, and a divergence is a cross-entropy less the teacher's entropy.
    sums = [loss * (count + 1e-5) + own for loss, count, own in zip(steps, counted, entropy, strict=True)]
    total = _weighed(objective, sums)
    return _result(objective, total, [int(step) for step in counted], None, model)


def layer_config(objective: Eagle3, **more: Any) -> transformers.LlamaConfig:
    """The draft's layer as both describe it."""
    shape = objective.draft.shape
    described: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_parameters": {"rope_theta": shape.rope_theta, **(shape.rope_scaling or {"rope_type": "default"})},
        "attention_bias": shape.attention_bias,
        "max_position_embeddings": shape.max_position_embeddings,
        "draft_vocab_size": shape.draft_vocab_size,
        "fc_norm": shape.fc_norm,
    }
    return transformers.LlamaConfig(**described, **more)


def take(model: nn.Module, objective: Eagle3) -> None:
    """Give a peer's model the draft's weights and vocabulary, and the target's embedding and head."""
    draft, vocabulary = objective.draft, objective.draft.vocabulary
    weights: dict[str, Tensor] = {_theirs(name, model): value for name, value in draft.state_dict().items()}
    weights["embed_tokens.weight"] = objective.embedding
    weights["t2d"] = torch.isin(torch.arange(draft.shape.vocab_size), vocabulary)
    own = model.state_dict()
    if "verifier_lm_head.weight" in own:
        weights |= {"verifier_lm_head.weight": objective.lm_head[vocabulary]}
        weights |= {"verifier_norm.weight": own["verifier_norm.weight"]}  # not used, see of_speculators
    model.load_state_dict({name: value for name, value in weights.items() if name in own or name not in ("d2t", "t2d")})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("verifier", "embed")))


def _theirs(name: str, model: nn.Module) -> str:
    return name if hasattr(model, "midlayer") else name.replace("midlayer.", "layers.0.")


def _sequences(delivery: Delivery) -> list[dict[str, Tensor]]:
    """The sequences of a batch, with Speculators' names for what belongs to a token."""
    batch = delivery.batch
    assert delivery.taps is not None
    assert delivery.final is not None
    columns = {
        "input_ids": torch.from_numpy(batch.tokens).long(),
        "hidden_states": delivery.taps.flatten(1),
        "verifier_last_hidden_states": delivery.final,
        "loss_mask": torch.from_numpy(batch.loss_mask),
    }
    cut = {name: torch.split(column, batch.lengths.tolist()) for name, column in columns.items()}
    return [{name: parts[index] for name, parts in cut.items()} for index in range(batch.lengths.size)]


def _weighed(objective: Eagle3, steps: Sequence[Tensor]) -> Tensor:
    """The sum of the steps' sums."""
    return torch.stack([objective.config.loss_decay**step * loss for step, loss in enumerate(steps)]).sum()


def _result(
    objective: Eagle3, total: Tensor, counted: list[int], correct: list[int] | None, model: nn.Module
) -> Result:
    model.zero_grad()
    total.backward()  # type: ignore[no-untyped-call]
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients: dict[str, Tensor] = {}
    for name, _ in objective.module.named_parameters():
        gradient = found[_theirs(name, model)]
        assert gradient is not None, name
        gradients[name] = gradient.clone()
    model.zero_grad()
    return Result(float(total.detach()), counted, correct, gradients)
