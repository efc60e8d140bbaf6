"""Speculators' and SpecForge's own training loops draw from a daemon; batches are those of their own loaders."""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from drafts import make_batch
from eagle import CONFIG, deliver, make_eagle
from peer_eagle import layer_config, take
from peers import importable, peer
from specd.adapters import specforge, speculators
from specd.client.subscriber import Subscriber
from specd.config.settings import DaemonConfig, RingConfig, SubscriberConfig, TargetConfig
from specd.daemon.serve import embedded
from specd.data.batching import BatchPlan, Loader
from specd.drafts.eagle3.objective import Eagle3
from specd.protocol.capture import CaptureSpec
from streams import rows

LENGTHS = (23, 1, 9, 2, 31)
SEQUENCES = tuple(range(5, 29))


def raw_samples(delivery: Any) -> list[dict[str, Tensor]]:
    """The sequences of a delivery, with Speculators' names."""
    batch, lengths = delivery.batch, delivery.batch.lengths.tolist()
    columns = {
        "hidden_states": delivery.taps.flatten(1),
        "input_ids": torch.from_numpy(batch.tokens).long(),
        "verifier_last_hidden_states": delivery.final,
        "loss_mask": torch.from_numpy(batch.loss_mask).long(),
    }
    cut = {name: column.split(lengths) for name, column in columns.items()}
    return [{name: parts[i] for name, parts in cut.items()} for i in range(len(lengths))]


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("size", [sum(LENGTHS), 80])
@pytest.mark.parametrize("algorithm", [*speculators.SHIFTED])
def test_speculators_collates_the_same(algorithm: str, size: int) -> None:
    data, delivery = peer("speculators.train.data"), deliver(make_batch(LENGTHS))
    shift = peer("speculators.models.eagle3.data").shift_batch if algorithm in ("eagle3", "peagle") else None
    samples = raw_samples(delivery)
    for sample in samples:  # what its BaseDataset adds
        sample["lengths"] = torch.tensor(sample["input_ids"].shape)
        sample["position_ids"] = torch.arange(len(sample["input_ids"]))
    collate = data.CollateFn(size, delivery.final.shape[1], 3, torch.float32, shift)  # type: ignore[union-attr]
    same(speculators.Form(algorithm, size)(delivery), collate(samples))


@pytest.mark.parametrize("algorithm", [*specforge.STATES])
def test_specforge_collates_the_same(algorithm: str) -> None:
    lengths = (23,) if algorithm == "peagle" else LENGTHS[::2]
    delivery = deliver(make_batch(lengths, density=1.1))
    taps, final = specforge.STATES[algorithm]
    eagle = final == "target"
    stored = {"hidden_states": "aux_hidden_state" if eagle else taps}
    stored["verifier_last_hidden_states"] = "hidden_state" if eagle else "target_last_hidden_states"
    samples = [{stored.get(name, name): value for name, value in one.items()} for one in raw_samples(delivery)]
    if eagle:
        owner = peer("specforge.algorithms.eagle3.data")
        normalize, collate = owner.normalize_offline_sample, owner.build_offline_collator()
    else:
        owner = peer("specforge.algorithms.common.dflash_family_data")
        dspark = algorithm == "dspark"
        normalize = owner.normalize_dspark_offline_sample if dspark else owner.normalize_offline_sample
        collate = owner.build_dspark_collator() if dspark else owner.build_collator()
    with importable():
        batch = specforge.Form(algorithm, ttt_length=7)(delivery)
    same(batch.tensors, collate([normalize(sample, 512) for sample in samples]))
    assert isinstance(batch, peer("specforge.runtime.contracts").TrainBatch)
    assert batch.sample_ids == [str(sample) for sample in delivery.batch.samples]
    assert batch.metadata == {"target_repr": "hidden_state" if eagle else None, "ttt_length": 7}


def page(function: str) -> Any:
    """What docs/adapters.md calls a function, as it stands there."""
    text = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    (code,) = (one for one in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f"def {function}(" in one)
    names: dict[str, Any] = {"__name__": "adapters"}
    exec(compile(code, "adapters.md", "exec"), names)
    return names[function]


@pytest.fixture
def objective() -> Eagle3:
    return make_eagle(CONFIG)


@pytest.fixture(scope="module")
def source() -> Iterator[Subscriber]:
    """A target as wide as the draft is made for."""
    target = TargetConfig(model="synthetic:hidden=32,layers=8,vocab=97")
    with embedded(DaemonConfig(target=target, ring=RingConfig(slots=6, max_sessions=2, slot_tokens=64))) as host:
        config = SubscriberConfig(endpoints=(host.endpoint,), depth=2, timeout_s=20, connect_s=20)
        with Subscriber(config, CaptureSpec(taps=(1, 3, 5), final=True, dtype="float32"), context=host.context) as one:
            yield one


def loader(most: int = 0) -> Loader:
    samples = rows(SEQUENCES, vocab=97)
    return Loader(samples, BatchPlan(samples.lengths, 64, most))


def speculators_draft(objective: Eagle3) -> Any:
    core, shape = peer("speculators.models.eagle3.core"), objective.draft.shape
    config = peer("speculators.models.eagle3").Eagle3SpeculatorConfig(
        transformer_layer_config=layer_config(objective, attn_implementation="eager"),
        draft_vocab_size=shape.draft_vocab_size,
    )
    model = core.Eagle3DraftModel(config=config)
    take(model, objective)
    masks = peer("speculators.models.attention").create_float_mask
    model._create_mask_fn = functools.partial(masks, dtype=torch.float32)
    return model


def test_speculators_draft_takes_states_behind_the_norm(objective: Eagle3) -> None:
    delivery = deliver(make_batch(LENGTHS))
    model = speculators_draft(objective)
    with torch.no_grad():
        model.verifier_norm.weight.copy_(torch.linspace(0.5, 2, model.verifier_norm.weight.numel()))
        kl = peer("speculators.losses").resolve_loss_config("kl_div", "eager")
        batch = speculators.Form("eagle3", 80)(delivery)
        batch.pop("error_records")
        own = model(**batch, loss_config=kl, ttt_steps=2)[1]
        batch["verifier_last_hidden_states"] = model.verifier_norm(batch["verifier_last_hidden_states"])
        twice = model(**batch, loss_config=kl, ttt_steps=2)[1]
        speculators.take_normed(model)
        assert float(model(**batch, loss_config=kl, ttt_steps=2)[1]) == pytest.approx(float(own), rel=1e-6)
    assert abs(float(twice - own)) > 1e-3 * float(own)


def test_speculators_trainer_draws_from_a_daemon_and_goes_on_within_an_epoch(
    source: Subscriber, objective: Eagle3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = peer("speculators.train.trainer")
    monkeypatch.setattr(train, "get_local_rank", lambda: "cpu")
    # It trains on accelerators alone.
    monkeypatch.setattr("torch.accelerator.synchronize", lambda: None)
    checkpointer = peer("speculators.train.checkpointer").SingleGPUCheckpointer
    for what in ("model", "optimizer"):  # the place alone is read back
        monkeypatch.setattr(checkpointer, f"load_{what}_state_dict", lambda *_: None)
    kl = peer("speculators.losses").resolve_loss_config("kl_div", "eager")
    seen: list[list[int]] = []

    def parts(folder: str, **settings: Any) -> tuple[Any, Any]:
        model = speculators_draft(objective)

        def keep(_model: Any, _given: Any, named: dict[str, Any]) -> None:
            seen.append(named["input_ids"].flatten().tolist())

        model.register_forward_pre_hook(keep, with_kwargs=True)
        config = train.TrainerConfig(
            lr=1e-4, num_epochs=2, save_path=str(tmp_path / folder), scheduler_type="none",
            hidden_states_dtype=torch.float32, train_call_kwargs={"loss_config": kl, "ttt_steps": 2}, **settings,
        )  # fmt: skip
        return model, config

    def trainer(folder: str, **settings: Any) -> Any:
        return train.Trainer(*parts(folder, **settings), speculators.StateLoader(source, loader(), "eagle3", 64))

    with importable():
        model, config = parts("whole")
        before = {name: value.clone() for name, value in model.named_parameters()}
        page("train_speculators")(model, config, source, loader(), 64)
        every, seen[:] = list(seen), []
        count = loader().plan.num_batches(0)
        assert len(every) == count + loader().plan.num_batches(1)
        assert any(not torch.equal(before[name], value) for name, value in model.named_parameters())

        half = round(count / 2)
        trainer("cut", checkpoint_freq=0.5, max_steps=half + 1).train_epoch(0)
        assert seen == every[: half + 1]
        seen.clear()
        trainer("cut", resume_from_checkpoint=True).run_training()
        assert seen == every[half:]


def test_specforges_controller_draws_from_a_daemon_and_goes_on_within_an_epoch(
    source: Subscriber, objective: Eagle3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = peer("specforge.algorithms.eagle3.model")
    reference = peer("specforge.core.loss")._compute_loss  # in place of a GPU kernel
    monkeypatch.setattr(module, "LogSoftmaxLoss", types.SimpleNamespace(apply=reference))
    backends, control = peer("specforge.training.backend"), peer("specforge.training.controller")
    seen: list[Any] = []

    class Recorded(peer("specforge.training.strategies.base").Eagle3TrainStrategy):  # type: ignore[misc]
        def forward_loss(self, batch: Any, ctx: Any = None) -> Any:
            seen.append((batch.sample_ids, batch.tensors["input_ids"].tolist()))
            return super().forward_loss(batch, ctx)

    def fit(**settings: Any) -> tuple[int, dict[str, Any], Any]:
        draft = peer("specforge.modeling.draft.llama3_eagle").LlamaForCausalLMEagle3(layer_config(objective))
        take(draft, objective)
        model = module.OnlineEagle3Model(draft, length=2)
        head_of = peer("specforge.modeling.target.target_head").TargetHead
        head = head_of.__new__(head_of)  # its constructor wants a target's directory
        nn.Module.__init__(head)
        head.fc = nn.Linear(1, 1, bias=False)
        head.fc.weight = nn.Parameter(objective.lm_head, requires_grad=False)
        optimizer = functools.partial(peer("specforge.optimizer").BF16Optimizer, lr=1e-3, total_steps=100)
        backend = backends.FSDPTrainingBackend(backends.ParallelConfig(), optimizer_factory=optimizer)
        backend.prepare_model(model, wrap=False, optimizer_target=draft)
        core = control.TrainerCore(Recorded(model, target_head=head), backend)
        last: dict[str, Any] = {}
        settings |= {"output_dir": str(tmp_path), "log_interval": 1, "logger": lambda found, _: last.update(found)}
        steps = page("train_specforge")(core, source, loader(), 2, **settings)
        return steps, last, draft

    with importable():
        steps, metrics, draft = fit()
        counts = [loader().plan.num_batches(epoch) for epoch in range(2)]
        assert steps == len(seen) == sum(counts)
        assert np.isfinite(metrics["loss"])
        assert metrics["grad_norm"] > 0
        assert not torch.equal(draft.fc.weight, objective.draft.fc.weight)
        assert sorted(int(one) for ids, _ in seen[: counts[0]] for one in ids) == list(range(len(SEQUENCES)))

        every, seen[:] = list(seen), []
        samples = sum(len(ids) for ids, _ in every[:3])
        assert fit(start_step=3, start_batch=3, start_samples=samples)[0] == sum(counts)
        assert seen == every[3:]
