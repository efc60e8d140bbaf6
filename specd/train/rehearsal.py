"""A run without its target: every check of settings and data, and what the run will take, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import msgspec
import torch

from specd.data.batching import Loader
from specd.drafts import registry
from specd.drafts.base import TargetParts
from specd.errors import ConfigError
from specd.protocol.batch import slot_bytes
from specd.protocol.capture import CaptureSpec, plain
from specd.protocol.contract import TargetContract
from specd.train.asked import Settle, check, check_recipe, output_of, travelling
from specd.train.checkpoint import finished_checkpoints
from specd.train.optimizer import total_steps
from specd.train.plan import Plan, longest
from specd.train.preparation import prepared, warn_of_length, with_data, with_dtype
from specd.train.validation import places_of


class Rehearsal(msgspec.Struct, frozen=True, kw_only=True):
    """What a run will take. All sizes in bytes.

    batches: of all epochs. steps: of the whole run, done: those that it has behind it. max_minutes: of training, 0 for
    no limit. parameters: trained ones. trainer_bytes: masters, gradients, moments and the target's frozen parts on the
    trainer's device; activations come on top. longest: tokens of the largest batch of the epoch that it is in, or of
    those held out. batch_bytes: states of a batch as large as it may be. staging_bytes: of the batches that a trainer
    holds. checkpoint_bytes: one of them; `keep` stay, and one more while it is written.
    """

    method: str
    target: str
    output: str
    device: str
    dtype: str
    rows: int
    samples: int
    tokens: int
    labels: int
    batches: int
    epochs: int
    steps: int
    max_minutes: float
    done: int
    warmup: int
    parameters: int
    trainer_bytes: int
    longest: int
    batch_bytes: int
    staging_bytes: int
    checkpoint_bytes: int
    keep: int
    taps: tuple[int, ...]
    final: bool


def captured(settle: Settle, contract: TargetContract) -> CaptureSpec:
    """The states that a run asks of a daemon. Raises ConfigError for a run that does not suit the target."""
    known = settle(contract.model)
    draft = check_recipe(known, contract.model)
    return travelling(known, registry.load(known.method).capture(draft, contract))


def rehearse(
    settle: Settle,
    contract: TargetContract,
    config: Mapping[str, Any],
    files: Path,
    *,
    resume: bool = False,
    show: bool = False,
) -> Rehearsal:
    """Check a run as `train_draft` would, prepare its data, and make its draft; nothing of the run is written.

    contract, config: of the target, and its config.json. files: directory of its tokenizer. What only a running target
    shows is not looked at: how it scales its embedding and logits, and its fingerprint.
    Raises as `train_draft` does before its first batch.
    """
    first = settle("")
    device = check(first)
    directory = output_of(first)
    if directory.path.exists():
        resume = directory.check(resume)
    name = contract.model
    known = settle(name)
    draft = check_recipe(known, name)
    settled = with_data(with_dtype(known, device), name)
    method = registry.load(settled.method)
    wanted = method.capture(draft, contract)
    spec = travelling(settled, wanted)
    settled, draft, dataset, held = prepared(
        settled,
        draft,
        files,
        contract.vocab_size,
        name,
        consecutive_labels=method.consecutive_labels,
        begun=directory.settings() if resume and directory.begun else None,
        show=show,
    )
    loader = Loader(dataset, dataset.plan(settled.data, settled.train.seed, held.samples), epochs=settled.train.epochs)
    warn_of_length(int(dataset.lengths.max()), config, name)
    dtype: torch.dtype = getattr(torch, settled.train.dtype)
    text = config.get("text_config") or config
    shape = (contract.vocab_size, contract.hidden_size)
    embedding = torch.empty(shape, dtype=dtype)
    head = embedding if text.get("tie_word_embeddings") else torch.empty(shape, dtype=dtype)
    parts = TargetParts(
        contract, dict(config), embedding, head, dataset.label_counts(contract.vocab_size, held.samples)
    )
    module = method.objective(draft, parts, "cpu", dtype, settled.train.seed).module
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    parameters = sum(parameter.numel() for parameter in trained)
    frozen = embedding.nbytes * (1 if head is embedding else 2)
    steps = total_steps(settled.train, loader.num_batches)
    kept = finished_checkpoints(directory.checkpoints) if directory.begun and resume else []
    done = kept[-1][0] if kept else 0
    accumulation = settled.train.accumulation
    plan = Plan(steps, done, done * accumulation)
    batch, decoded = (slot_bytes(one, contract.hidden_size, settled.data.batch_tokens) for one in (spec, wanted))
    return Rehearsal(
        method=settled.method,
        target=name,
        output=str(directory.path),
        device=device,
        dtype=settled.train.dtype,
        rows=dataset.report.rows,
        samples=len(dataset),
        tokens=dataset.report.tokens,
        labels=dataset.report.trainable_tokens,
        batches=loader.num_batches,
        epochs=settled.train.epochs,
        steps=steps,
        max_minutes=settled.train.max_minutes,
        done=done,
        warmup=ceil(settled.train.warmup_ratio * steps),
        parameters=parameters,
        trainer_bytes=16 * parameters + frozen,
        longest=longest(loader, places_of(settled, dataset, held), plan, accumulation),
        batch_bytes=batch,
        staging_bytes=batch * (settled.subscriber.depth + 1) + decoded * spec.scaled,
        checkpoint_bytes=parameters * (12 + dtype.itemsize),
        keep=settled.train.keep,
        taps=spec.taps,
        final=spec.final,
    )


def contract_of(name: str, config: Mapping[str, Any], dtype: str) -> TargetContract:
    """What config.json says of a target. Raises ConfigError where it does not say it."""
    text = config.get("text_config") or config
    try:
        return TargetContract(
            model=name,
            model_type=str(config.get("model_type", "")),
            hidden_size=int(text["hidden_size"]),
            num_layers=int(text["num_hidden_layers"]),
            vocab_size=int(text["vocab_size"]),
            dtype=plain(dtype),
            weights="",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"config.json of {name} does not say {error}, so its run can only be tried with the target itself: leave "
            f"--dry-run out, and give --max-steps 1"
        ) from None
