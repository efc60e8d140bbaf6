"""Configuration as data: frozen structs, YAML files, `--set a.b=c`. Unknown keys are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

AttentionKind = Literal["auto", "flex", "sdpa"]
"""How a draft attends: flex_attention, plain torch ops, or whichever suits the device."""

Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
Decay = Annotated[float, Meta(ge=0, lt=1)]


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all configuration. `convert` checks the ranges of numbers; a constructor takes what it is given."""


class TargetConfig(Config, kw_only=True, frozen=True):
    """The target and how to run it.

    model: a preset of configs/, a local directory, or a hub name. dtype: `auto` is the preset's, else the checkpoint's.
    load_format: `auto` reads the weights, `dummy` makes them up from config.json. num_layers: 0 keeps the model's
    depth, any other number cuts it (dummy weights only). threads: CPU threads of a forward, 0 for torch's choice.
    max_forward_tokens: several small batches share one forward up to this many tokens. exact: one batch a forward,
    so that results are bit-identical to a local run.
    Of the SGLang backend alone: tp, over how many GPUs of this host it is spread, from `device` on; memory_fraction of
    a GPU's free memory that weights and KV cache may take, 0 for specd's choice; attention_backend, `auto` for its own.
    """

    model: str
    backend: Literal["auto", "sglang", "transformers", "synthetic"] = "auto"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    num_layers: NotNegative = 0
    threads: NotNegative = 0
    max_forward_tokens: int = 16384
    exact: bool = False
    tp: int = 1
    memory_fraction: float = 0.0
    attention_backend: str = "auto"


class RingConfig(Config, kw_only=True, frozen=True):
    """The ring. slots: how many. slot_tokens: the longest batch, in tokens of the daemon's own capture.

    max_sessions: trainers at once; each always has one slot of its own, the other slots − max_sessions are shared.
    """

    slots: Positive = 8
    slot_tokens: Positive = 4096
    max_sessions: Positive = 4
    lease_ttl_s: Annotated[float, Meta(ge=0.05, le=86_400)] = 30.0


class CaptureConfig(Config, kw_only=True, frozen=True):
    """The capture the slots are sized for. num_taps and final as in CaptureSpec; dtype `auto` is the target's."""

    num_taps: int = 5
    final: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class DaemonConfig(Config, kw_only=True, frozen=True):
    """One daemon. endpoint: `auto` is the default ipc endpoint of this user.

    transports: what it serves; `auto` is everything that can be served from where its ring lies.
    """

    target: TargetConfig
    endpoint: str = "auto"
    transports: tuple[str, ...] = ("auto",)
    ring: RingConfig = RingConfig()
    capture: CaptureConfig = CaptureConfig()
    insecure: bool = False


class SubscriberConfig(Config, kw_only=True, frozen=True):
    """The trainer's client. depth: batches in flight beyond the one in use; 0 asks only on demand.

    timeout_s: longest wait for one batch. connect_s: longest time without any usable daemon.
    max_attempts: how often one batch may be submitted before the run ends with an error that names it.
    borrow: read the daemon's slots in place, without a copy, where trainer and target share one GPU; a slot then stays
    taken until its batch was trained.
    """

    endpoints: tuple[str, ...] = ("auto",)
    transport: str = "auto"
    depth: NotNegative = 2
    timeout_s: Annotated[float, Meta(gt=0)] = 300.0
    connect_s: Annotated[float, Meta(ge=0)] = 120.0
    max_attempts: Positive = 5
    borrow: bool = False


class DataConfig(Config, kw_only=True, frozen=True):
    """Training data. path: JSONL, Parquet or a hub name; empty takes the preset's.

    format: `auto` looks at the columns. last_turn_only: only the last assistant turn is a label.
    max_length: longer samples are cut. batch_tokens: token budget of a batch. max_batch_sequences: at most so many
    sequences in one, 0 for no limit. max_samples: only the first so many rows, 0 for all. template: variables of the
    chat template, as enable_thinking. cache_dir: where prepared data is kept; empty for specd's own cache.
    """

    path: str = ""
    split: str = "train"
    format: Literal["auto", "conversations", "text", "tokens"] = "auto"
    last_turn_only: bool = False
    max_length: int = 3072
    batch_tokens: Positive = 3072
    max_batch_sequences: int = 0
    max_samples: int = 0
    template: dict[str, Any] = {}
    cache_dir: str = ""


class DFlashConfig(Config, kw_only=True, frozen=True):
    """The DFlash draft (arXiv 2602.06036).

    loss_decay: γ of the position weights, 0 for none, −1 for the paper's choice.
    block_size: tokens a block, its anchor included. num_anchors: blocks drawn from a sequence, at most.
    loss_chunk: predictions whose logits exist at a time. attention: `flex` needs a GPU.
    num_heads, num_kv_heads, head_dim, intermediate_size: 0 takes the target's. mask_token_id: −1 takes the preset's.
    sliding_window: 0 for full attention in every layer.
    """

    num_layers: Positive = 5
    num_taps: Positive = 5
    block_size: Annotated[int, Meta(ge=2)] = 16
    num_anchors: Positive = 512
    loss_decay: float = -1.0
    mask_token_id: Annotated[int, Meta(ge=-1)] = -1
    intermediate_size: NotNegative = 0
    num_heads: NotNegative = 0
    num_kv_heads: NotNegative = 0
    head_dim: NotNegative = 0
    sliding_window: NotNegative = 0
    attention: AttentionKind = "auto"
    loss_chunk: Positive = 1024


class TrainConfig(Config, kw_only=True, frozen=True):
    """The training loop. accumulation: batches an optimizer step. max_steps: 0 for all epochs.

    save_every, keep: checkpoints each so many steps, and how many stay. dtype: of the draft's forward; the masters are
    float32.
    """

    lr: Annotated[float, Meta(gt=0)] = 6e-4
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    warmup_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.04
    clip: Annotated[float, Meta(ge=0)] = 1.0
    epochs: Positive = 6
    max_steps: NotNegative = 0
    accumulation: Positive = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    threads: NotNegative = 0
    seed: int = 0
    save_every: NotNegative = 500
    keep: Positive = 2
    log_every: Positive = 1


class RunConfig(Config, kw_only=True, frozen=True):
    """Everything of one `specd train`. output: the run directory.

    target: of a target that the trainer hosts itself, overrides of its TargetConfig; all but `model`, which is given
    apart. Its device is the trainer's unless named here. Daemons have settings of their own.
    """

    output: str = "runs/dflash"
    target: dict[str, Any] = {}
    data: DataConfig = DataConfig()
    draft: DFlashConfig = DFlashConfig()
    train: TrainConfig = TrainConfig()
    subscriber: SubscriberConfig = SubscriberConfig()
