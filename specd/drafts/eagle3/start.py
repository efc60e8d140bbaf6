"""The EAGLE-3 draft that a run begins with: a new one, or the weights and the vocabulary of another."""

from __future__ import annotations

from typing import Any

import msgspec
import torch
from torch import Tensor

from specd.drafts.base import TargetParts
from specd.drafts.eagle3.export import load_draft, read_shape
from specd.drafts.eagle3.model import Eagle3Draft, Eagle3Shape, draft_shape
from specd.drafts.eagle3.settings import Eagle3Config
from specd.drafts.initial import initial_config, same_shape
from specd.drafts.taps import eagle3_taps
from specd.drafts.vocabulary import check_covered, draft_vocabulary
from specd.errors import ConfigError
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import TargetContract

SETTINGS = {
    "hidden_size": "", "vocab_size": "", "num_heads": "draft.num_heads", "num_kv_heads": "draft.num_kv_heads",
    "head_dim": "draft.head_dim", "intermediate_size": "draft.intermediate_size",
    "draft_vocab_size": "draft.draft_vocab_size", "norm_output": "draft.norm_output", "fc_norm": "draft.fc_norm",
}  # fmt: skip
"""What of the shape must be equal, and which setting says it."""


def initial_shape(config: Eagle3Config) -> Eagle3Shape | None:
    """The shape of the draft that `config` begins with, None for a new one. Raises as `read_shape`."""
    if not config.init:
        return None
    found, path = initial_config(config.init)
    shape = read_shape(found, str(path))
    if shape.num_taps != 3:
        raise ConfigError(f"draft.init={config.init!r}: it reads {shape.num_taps} layers, expected 3; leave it out")
    return shape


def taps_of(config: Eagle3Config, contract: TargetContract) -> tuple[int, ...]:
    """The target layers that the draft reads: the usual three, or those of the draft it begins with."""
    found = initial_shape(config)
    if found is None or not found.taps:
        return eagle3_taps(contract.num_layers)
    if reason := CaptureSpec(taps=found.taps).problem(contract.num_layers):
        raise ConfigError(f"draft.init={config.init!r} is a draft for another target: {reason}")
    return found.taps


def started(config: Eagle3Config, target: TargetParts, seed: int) -> Eagle3Draft:
    """The draft in its first state, on the CPU. Raises ConfigError where settings, target and `init` do not fit.

    A draft that was trained before keeps its vocabulary, because the rows of its head are those tokens.
    """
    taps = taps_of(config, target.contract)
    asked = draft_shape(config, target.config, taps)
    target.check(asked.vocab_size, asked.hidden_size)
    found = initial_shape(config)
    if found is None:
        return Eagle3Draft(asked, seed, _chosen(asked, target))
    same_shape(_facts(found), _facts(asked), SETTINGS, config.init)
    draft = load_draft(initial_config(config.init)[1])
    draft.shape = msgspec.structs.replace(
        found, taps=taps, num_target_layers=asked.num_target_layers, num_steps=config.num_steps
    )
    if target.label_counts is not None:
        check_covered(target.label_counts, draft.vocabulary.numpy(), f"the vocabulary of draft.init={config.init!r}")
    return draft


def _chosen(shape: Eagle3Shape, target: TargetParts) -> Tensor | None:
    """The most frequent labels, as many as the draft can guess; None for all tokens."""
    if shape.draft_vocab_size == shape.vocab_size:
        return None
    if target.label_counts is None:
        raise ConfigError(
            f"draft.draft_vocab_size={shape.draft_vocab_size}: expected label counts of the training data to choose "
            f"them by (TargetParts.label_counts); give them, or 0 for the target's whole vocabulary"
        )
    return torch.from_numpy(draft_vocabulary(target.label_counts, shape.draft_vocab_size))


def _facts(shape: Eagle3Shape) -> dict[str, Any]:
    return msgspec.structs.asdict(shape)
