"""Settings of an EAGLE-3 draft."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from specd.config.settings import AttentionKind, Config, NotNegative, Positive


class Eagle3Config(Config, kw_only=True, frozen=True):
    """The EAGLE-3 draft (arXiv 2503.01840).

    num_steps: steps of training-time test, so many guesses in a row. loss_decay: weight of each step beside the one
    before. draft_vocab_size: tokens that it can guess, the most frequent labels of the training data; 0 for all of the
    target's. norm_output: it hands its normed state to the next step. fc_norm: each tap is normed before the taps are
    joined; both as SGLang and vLLM read these keys (EAGLE-3.1).
    loss_chunk: teacher rows whose logits exist at a time, with those of all steps that they teach.
    attention: `flex` needs a GPU.
    num_heads, num_kv_heads, head_dim, intermediate_size: 0 takes the target's.
    init: directory of a draft, or of the run that exported it, whose weights and vocabulary training begins with.
    """

    num_steps: Positive = 7
    loss_decay: Annotated[float, Meta(gt=0, le=1)] = 0.8
    draft_vocab_size: NotNegative = 32_000
    norm_output: bool = False
    fc_norm: bool = False
    intermediate_size: NotNegative = 0
    num_heads: NotNegative = 0
    num_kv_heads: NotNegative = 0
    head_dim: NotNegative = 0
    attention: AttentionKind = "auto"
    loss_chunk: Positive = 512
    init: str = ""
