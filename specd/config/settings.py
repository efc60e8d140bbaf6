"""Configuration as data: frozen structs, YAML files, `--set a.b=c`. Unknown keys are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from specd.protocol.capture import CaptureSpec

AttentionKind = Literal["auto", "flex", "sdpa"]
"""How a draft attends: flex_attention, plain torch ops, or whichever suits the device."""

Collectives = Literal["auto", "gloo", "nccl"]
"""By what the ranks of a training exchange gradients."""

Packing = Literal["anew", "fixed"]
"""Whether each epoch packs its samples into batches anew, or all have the same batches."""

Positive = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
Decay = Annotated[float, Meta(ge=0, lt=1)]


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all configuration. `convert` checks the ranges of numbers; a constructor does not."""


class TargetConfig(Config, kw_only=True, frozen=True):
    """The target and how to run it.

    model: a preset of configs/, a local directory, or a hub name. dtype: `auto` is the preset's, else the
    checkpoint's. tokenizer: directory of its tokenizer, where the checkpoint has none (a preset with made-up
    weights). backend: `auto`, or one by name: sglang, transformers, synthetic, or a plug-in's. device: cpu, cuda or
    cuda:N; `auto` is a GPU where there is one. load_format: `auto` reads the weights, `dummy` draws random ones for
    config.json. num_layers: 0 keeps the model's depth, any other number cuts it (dummy weights only). threads: CPU
    threads of a forward, 0 for torch's choice. max_forward_tokens: several small batches share one forward up to this
    many tokens. exact: one batch a forward, so that results are bit-identical to a local run. trust_remote_code: run
    Python code that comes with the checkpoint, of which some models consist (transformers backend). tp: over how many
    GPUs of this host it is spread, from `device` on (SGLang). memory_fraction: share of a GPU's free memory that
    weights and KV cache may take, 0 for specd's choice (SGLang). attention_backend: SGLang's, `auto` for its own.
    prefill_graphs: forwards of few tokens as CUDA graphs, which cost the memory of all layers' states: true, or a list
    of their tokens (SGLang).
    """

    model: str
    tokenizer: str = ""
    backend: str = "auto"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    num_layers: NotNegative = 0
    threads: NotNegative = 0
    max_forward_tokens: int = 16384
    exact: bool = False
    trust_remote_code: bool = False
    tp: int = 1
    memory_fraction: float = 0.0
    attention_backend: str = "auto"
    prefill_graphs: bool | tuple[Positive, ...] = False


class RingConfig(Config, kw_only=True, frozen=True):
    """The ring.

    slots: how many batches it holds. slot_tokens: the longest batch, in tokens of the daemon's own capture.
    max_sessions: trainers at once; each always has one slot of its own, the other slots − max_sessions are shared.
    payload_mib: MiB that the images of a batch may bring for the target, 0 to take text alone.
    lease_ttl_s: seconds for which a trainer of another host may hold a slot without a sign of life.
    pace_s: seconds a batch for which a trainer may be held for others that share its forwards; 0 never, two forwards of
    a batch, as measured, where it is left out. lag_gb: memory for what trainers of a share were done with before others
    that lag had it, in 10⁹ bytes: those read it from there, and no forward is made again; 0 for none.
    """

    slots: Positive = 8
    slot_tokens: Positive = 4096
    max_sessions: Positive = 4
    payload_mib: Annotated[int, Meta(ge=0, le=256)] = 0
    lease_ttl_s: Annotated[float, Meta(ge=0.05, le=86_400)] = 30.0
    pace_s: Annotated[float, Meta(ge=0, le=3600)] | None = None
    lag_gb: Annotated[float, Meta(ge=0, le=1e6)] = 0.0


class AlwaysConfig(Config, kw_only=True, frozen=True):
    """States that every forward for a share captures, whoever is in it, so that one who comes late finds its own.

    taps: layers, from 0. final: the last hidden state after the final norm.
    """

    taps: tuple[NotNegative, ...] = ()
    final: bool = False

    @property
    def spec(self) -> CaptureSpec | None:
        """The same in the dtype of nobody yet, None where there is nothing."""
        return CaptureSpec(taps=tuple(sorted(set(self.taps))), final=self.final) if self.taps or self.final else None


class CaptureConfig(Config, kw_only=True, frozen=True):
    """The capture that the slots are sized for.

    num_taps: how many layers, or as many as there are in `always`. final: the last hidden state after the final norm,
    too. dtype: of the states; `auto` is the target's. Slots of float8_e4m3fn take half the memory, and half the tokens
    of a trainer that asks for bfloat16. always: what every forward for a share captures beside what its trainers want.
    """

    num_taps: int = 5
    final: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float8_e4m3fn"] = "auto"
    always: AlwaysConfig = AlwaysConfig()

    @property
    def sized_for(self) -> tuple[int, bool]:
        """How many layers slots hold, and whether the final state."""
        return max(self.num_taps, len(set(self.always.taps))), self.final or self.always.final


class ReplayConfig(Config, kw_only=True, frozen=True):
    """States that are kept over epochs, to be read instead of computed; only trainings with data.packing=fixed profit.

    dir: on a local disk, for this daemon alone; empty for no disk. gb: size of its file, in 10⁹ bytes. ram_gb: memory
    that keeps states, too, for the life of the worker; 0 for none. encoding: how they are kept: `raw`, to the bit, or
    as float8_e4m3fn with a scale for each tap of a token: about half of bfloat16, and rounded where they are read.
    """

    dir: str = ""
    gb: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    ram_gb: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    encoding: Literal["raw", "float8_e4m3fn"] = "raw"

    @property
    def on(self) -> bool:
        """Whether anything is kept."""
        return bool(self.dir or self.ram_gb)

    def problem(self, *, exact: bool, dtype: str) -> str | None:
        """Why this cannot be meant, or None if it can. exact: as of the target. dtype: that the slots are sized for."""
        if self.dir and not self.gb:
            return f"replay.dir={self.dir} without a size: say how much of that disk may be used, as --replay-gb 500"
        if self.gb and not self.dir:
            return f"replay.gb={self.gb:g} without a directory: say where, as --replay DIR, or use --replay-ram-gb"
        if self.encoding == "raw":
            return None
        asked = f"replay.encoding={self.encoding}"
        if not self.on:
            return f"{asked}, and nothing is kept: say where, as --replay DIR or --replay-ram-gb, or leave it out"
        if exact:
            return (
                f"{asked} rounds the states that are read, and the target is exact: leave out --exact, or keep them raw"
            )
        if dtype == self.encoding:
            return (
                f"{asked} with capture.dtype={dtype}: slots hold codes already, which are kept as they are: leave out "
                f"replay.encoding"
            )
        return None


class DaemonAuth(Config, kw_only=True, frozen=True):
    """Whom a daemon lets in over TCP.

    key: its own, by name or path; no key itself stands in settings. authorized: the file of those it lets in; empty
    for the one among this user's keys.
    """

    key: Annotated[str, Meta(min_length=1)]
    authorized: str = ""


class DaemonConfig(Config, kw_only=True, frozen=True):
    """All settings of one `specd start`.

    target: what it hosts. endpoint: where it listens, ipc://PATH or tcp://ADDRESS:PORT; `auto` is the ipc endpoint of
    this user. ring: its slots. capture: what they are sized for. replay: what is kept over epochs. transports: what
    it serves; `auto` is everything that can be served from where its ring lies. hang_s: a worker that has work and
    finishes none for so long, and for 20 times the usual, is replaced; ten times as long for its first. auth: keys,
    for a TCP endpoint. insecure: without keys, trainers need not be of this user, nor on this host. insecure_data:
    with keys, also serve transports beyond this host that do not encrypt states (nccl, nixl). metrics: PORT or
    ADDRESS:PORT of a page for Prometheus, for this machine alone where no address is named; empty for none.
    """

    target: TargetConfig
    endpoint: str = "auto"
    transports: tuple[str, ...] = ("auto",)
    ring: RingConfig = RingConfig()
    capture: CaptureConfig = CaptureConfig()
    replay: ReplayConfig = ReplayConfig()
    hang_s: Annotated[float, Meta(gt=0, le=86_400)] = 60.0
    auth: DaemonAuth | None = None
    insecure: bool = False
    insecure_data: bool = False
    metrics: str = ""

    def problem(self) -> str | None:
        """Why these settings cannot be meant together, or None if they can."""
        return self.replay.problem(exact=self.target.exact, dtype=self.capture.dtype)


class TrainerAuth(Config, kw_only=True, frozen=True):
    """Who a trainer is over TCP, and whom it trusts.

    key: its own, by name or path; no key itself stands in settings. servers: the public key of the daemon at each TCP
    endpoint. With `auth` none is talked to without one.
    """

    key: Annotated[str, Meta(min_length=1)]
    servers: dict[str, str] = {}


class SubscriberConfig(Config, kw_only=True, frozen=True):
    """The trainer's client.

    endpoints: of the daemons, `auto` for this user's. transport: `auto`, or one by name: that one or an error. depth:
    batches in flight beyond the one in use; 0 requests on demand only. timeout_s: longest wait for one batch.
    connect_s: longest time without any usable daemon. borrow: read the daemon's slots in place, without a copy, where
    trainer and target share one GPU; a slot then stays taken until its batch was trained; in a share only what lies in
    one piece, such as final states alone. place: which daemons a rank takes where a training has several ranks. `near`
    means those on its own host, or all if none is, shared evenly among the ranks, and the rest only while none of these
    is up; `all` means every one. auth: keys, for TCP endpoints. insecure_data: with keys, also take transports from
    another host that do not encrypt states (nccl, nixl). share: trainers that name the same one, and train on the same
    batches, share forwards of the target, whatever layers each of them wants; empty to share with nobody.
    """

    endpoints: tuple[str, ...] = ("auto",)
    transport: str = "auto"
    depth: NotNegative = 2
    timeout_s: Annotated[float, Meta(gt=0)] = 300.0
    connect_s: Annotated[float, Meta(ge=0)] = 120.0
    borrow: bool = False
    place: Literal["near", "all"] = "near"
    share: Annotated[str, Meta(max_length=200)] = ""
    auth: TrainerAuth | None = None
    insecure_data: bool = False


class DataConfig(Config, kw_only=True, frozen=True):
    """Training data.

    path: a file (JSONL, JSON, Parquet, text; gzip and zstd too), a folder or glob of them, or a hub name; several as a
    list; empty takes the preset's. split, subset: of a hub data set. weights: for several paths, how often each sample
    of one is trained an epoch, 1 each if empty; 0.5 takes half of them, another half each epoch. format: `auto` looks
    at the columns. columns: names of a file's columns, as {prompt: question}. last_turn_only: only the last assistant
    turn is a label. bad_rows: `stop` at a file with rows that cannot be used, once all are counted, or `skip` and
    count them. max_length: most tokens of a sample. long: what becomes of longer ones, `cut`, or `split` into several
    where they are documents. batch_tokens: size of a batch, in tokens at most. max_batch_sequences: most sequences of
    one, 0 for no limit. packing: of samples into batches: `anew` each epoch, or `fixed`, every epoch has the batches of
    the first, in another order, so that a daemon that keeps states (`specd start --replay`) has them. max_samples: only
    the first N rows, 0 for all. template: variables of the chat template, as enable_thinking. date: the day that a
    template is told which asks for it, as 2026-01-31; empty for the day on which the run begins. cache_dir: where
    prepared data is kept; empty for specd's own cache. processes: that prepare it, 0 for one a core and at most 16.
    """

    path: str | tuple[str, ...] = ""
    weights: tuple[Annotated[float, Meta(gt=0, le=1000)], ...] = ()
    split: str = "train"
    subset: str = ""
    format: Literal["auto", "conversations", "text", "tokens"] = "auto"
    columns: dict[str, str] = {}
    last_turn_only: bool = False
    bad_rows: Literal["stop", "skip"] = "stop"
    max_length: int = 3072
    long: Literal["cut", "split"] = "cut"
    batch_tokens: Positive = 3072
    max_batch_sequences: int = 0
    packing: Packing = "anew"
    max_samples: int = 0
    template: dict[str, Any] = {}
    date: Annotated[str, Meta(pattern=r"^(\d{4}-\d{2}-\d{2})?$")] = ""
    cache_dir: str = ""
    processes: NotNegative = 0


class TrainConfig(Config, kw_only=True, frozen=True):
    """The training loop.

    lr: the highest learning rate; it rises linearly, then falls along a cosine to 0 at the last step. betas: decay of
    AdamW's two moments. weight_decay: of AdamW, on matrices. warmup_ratio: share of the steps in which the rate rises.
    clip: largest norm of the gradients, 0 for no clipping. epochs: how often the data is gone through. max_steps:
    optimizer steps at most, 0 for all epochs. max_minutes: of training at most, 0 for no limit, counted over the steps
    and across resumes; the learning rate then falls by the clock, where that is ahead of the steps. accumulation:
    batches an optimizer step. dtype: of the draft's forward, `auto` is bfloat16 on a GPU; master weights are float32.
    device: cpu, cuda or cuda:N; `auto` is a GPU where there is one. threads: CPU threads of torch, 0 for its choice.
    seed: of initial weights, data order and what a draft draws. save_every: steps between checkpoints, 0 for none but
    the last. keep: how many checkpoints stay. log_every: steps between two looks at the device's figures; it changes no
    number. collectives: by what several ranks, which share the batches of a step, sum gradients; `auto` is nccl on
    GPUs, one for each rank, and gloo on CPUs; gloo also has ranks share a GPU. peer_patience_s: how long a rank may
    show no life before the others end, 0 for 5 s on one host and 30 s on several.
    """

    lr: Annotated[float, Meta(gt=0)] = 6e-4
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    warmup_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.04
    clip: Annotated[float, Meta(ge=0)] = 1.0
    epochs: Positive = 6
    max_steps: NotNegative = 0
    max_minutes: Annotated[float, Meta(ge=0)] = 0.0
    accumulation: Positive = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    threads: NotNegative = 0
    seed: int = 0
    save_every: NotNegative = 500
    keep: Positive = 2
    log_every: Positive = 1
    collectives: Collectives = "auto"
    peer_patience_s: Annotated[float, Meta(ge=0)] = 0.0


class StatesConfig(Config, kw_only=True, frozen=True):
    """How the states of the target come.

    dtype: `auto` is the target's. float8_e4m3fn, with a scale for each tap of a token, takes half the bytes of bfloat16
    on the wire, in the daemon's slots and in staging buffers, and rounds states to four significant bits; drafts read
    them in the target's dtype.
    """

    dtype: Literal["auto", "float8_e4m3fn"] = "auto"


class ValidationConfig(Config, kw_only=True, frozen=True):
    """Rows that are held out of training, and measured.

    share: part of the data's rows that is held out, 0 for none; `auto` is what a resumed run began with, else 0.02, or
    none where that is fewer than 25 rows. rows: at most so many are held out, whatever their share. every: optimizer
    steps between two measurements, 0 for as few as add 2 % to the tokens of training. patience: so many measurements in
    a row without a lower loss end the run, 0 for none; its draft is then the best one. decode_every: optimizer steps
    between two real decodings, and measurements, 0 for none. prompts: so many of the held-out rows are decoded.
    max_new_tokens: longest answer.
    """

    share: Literal["auto"] | Annotated[float, Meta(ge=0, lt=1)] = "auto"
    rows: Positive = 500
    every: NotNegative = 0
    patience: NotNegative = 0
    decode_every: NotNegative = 0
    prompts: Positive = 8
    max_new_tokens: Positive = 64


class LogConfig(Config, kw_only=True, frozen=True):
    """Where a run's progress goes, beside its journal, which is always written.

    to: tensorboard, wandb, mlflow, trackio, or several. project: of trackers that have some; MLflow's experiment. name:
    of the run there; empty for that of its directory. metrics: as a daemon's: PORT or ADDRESS:PORT of a page for
    Prometheus, empty for none.
    """

    to: tuple[str, ...] = ()
    project: Annotated[str, Meta(min_length=1)] = "specd"
    name: str = ""
    metrics: str = ""


class RunConfig(Config, kw_only=True, frozen=True):
    """All settings of one `specd train METHOD`.

    method: which draft is trained. draft: its settings, those of its method. output: the run directory; empty is
    runs/METHOD. data: what it trains on. capture: how states come. train: the training loop. log: where its progress
    goes. subscriber: where states come from. target: settings of a target that the trainer hosts itself, as those of
    `specd start`; its device is the trainer's unless named here. Daemons have settings of their own.
    """

    method: str
    output: str = ""
    target: dict[str, Any] = {}
    data: DataConfig = DataConfig()
    draft: dict[str, Any] = {}
    capture: StatesConfig = StatesConfig()
    train: TrainConfig = TrainConfig()
    validation: ValidationConfig = ValidationConfig()
    log: LogConfig = LogConfig()
    subscriber: SubscriberConfig = SubscriberConfig()

    @property
    def sessions(self) -> int:
        """How many it has with a daemon: decoding held-out prompts takes one of its own."""
        return 1 + (self.validation.decode_every > 0)
