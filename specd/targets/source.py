"""A target's checkpoint: from a preset, a directory or a hub name to a model, a tokenizer and their digests."""

from __future__ import annotations

import gzip
import json
import logging
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from specd.config.presets import Preset, preset, presets
from specd.errors import ConfigError, TargetError, first_line
from specd.paths import shown
from specd.protocol.contract import TEMPLATES
from specd.targets.gguf import convert

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Need = Literal["weights", "tokenizer", "shape"]

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A directory with any of these holds a tokenizer."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    *(IMAGE_FILES := ("preprocessor_config.json",)),
)
"""Files of a tokenizer, its chat template and its images; a checkpoint has some, and further templates in TEMPLATES."""


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where a target comes from.

    name: for the contract and logs; of a local directory its whole path, so that it is never a preset's name.
    config: its config.json. path: the directory with config.json, tokenizer and weights; None when only the shape was
    asked for and a preset knows it. preset: set if it is one. tokenizer: a separate directory for the tokenizer.
    """

    name: str
    config: dict[str, Any]
    path: Path | None = None
    preset: Preset | None = None
    tokenizer: Path | None = None

    @property
    def revision(self) -> str:
        """The commit that `path` is a snapshot of in a cache of the hub, empty for other directories."""
        match self.path.resolve().parts[-3:] if self.path else ():
            case (repository, "snapshots", commit) if repository.startswith("models--"):
                return commit
        return ""

    def file(self, name: str) -> bytes | None:
        """One of the tokenizer's files, also if stored compressed (`tokenizer.json.gz`); None if missing."""
        directory = self.tokenizer or self.path
        if directory is None:
            return None
        if (directory / name).is_file():
            return (directory / name).read_bytes()
        packed = directory / f"{name}.gz"
        try:
            return gzip.decompress(packed.read_bytes()) if packed.is_file() else None
        except (OSError, EOFError, zlib.error) as error:
            raise TargetError(f"{packed} cannot be unpacked: {error}; copy it here again") from None

    def files(self) -> dict[str, bytes]:
        """All the tokenizer's files, its chat templates among them, by name; none without a tokenizer."""
        directory = self.tokenizer or self.path
        further = sorted((directory / TEMPLATES).glob("*.jinja")) if directory else []
        names = (*TOKENIZER_FILES, *(f"{TEMPLATES}/{file.name}" for file in further if not file.name.startswith(".")))
        found = ((name, self.file(name)) for name in names)
        return {name: data for name, data in found if data is not None}


def with_tokenizer(source: Source, directory: str) -> Source:
    """`source` with the tokenizer of another directory; unchanged for an empty one.

    Raises ConfigError for a directory that holds none.
    """
    if not directory:
        return source
    found = msgspec.structs.replace(source, tokenizer=Path(os.path.expanduser(directory)))
    if not any(found.file(name) is not None for name in TOKENIZERS):
        raise ConfigError(
            f"tokenizer {directory!r}: no tokenizer there; expected a directory with {' or '.join(TOKENIZERS)}"
        )
    return found


def resolve(model: str, *, need: Need = "weights", code: bool = False) -> Source:
    """Find `model`: a preset of configs/, a local directory, or a hub name (owner/name).

    A preset whose weights come in a Python package is converted once, to specd's cache. A string with a slash that
    is a directory is that directory. need: `tokenizer` and `shape` fetch no weights from a hub. code: its Python files
    are fetched, too.
    Raises ConfigError when there is no such target, TargetError when it cannot be read or downloaded.
    """
    directory = Path(os.path.expanduser(model))
    if os.sep in model and directory.is_dir():
        return _from_directory(directory, name=str(directory.resolve()))
    known = preset(model)
    if known is not None and ("/" not in model or model.lower() == known.hub.lower()):
        if need == "shape" and known.config:
            return Source(name=known.name, config=known.config, preset=known)
        path = convert(known) if known.package else _download(known.hub, need, code)
        return _from_directory(path, name=known.name, preset=known)
    if directory.is_dir():
        return _from_directory(directory, name=str(directory.resolve()))
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _from_directory(_download(model, need, code), name=model)
    raise ConfigError(
        f"model {model!r}: expected a preset ({', '.join(presets())}), a directory with a config.json, "
        f"or a hub name like owner/name"
    )


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
    for place in (str(path), name):
        if shown(place) != place:
            raise ConfigError(
                f"model directory '{shown(place)}' is not UTF-8, as what reads weights and tokenizers needs; rename it"
            )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"model directory {str(path)!r} has no readable config.json: {error.strerror}") from None
    except ValueError as error:
        raise TargetError(f"{path / 'config.json'} is not JSON: {error}; fetch the checkpoint again") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise TargetError(f"{path / 'config.json'} has no model_type: expected the config of a transformers model")
    return Source(name=name, config=config, path=path, preset=preset)


def _download(repo: str, need: Need, code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    patterns = ["config.json"]
    if need != "shape":
        patterns += (*TOKENIZER_FILES, f"{TEMPLATES}/*.jinja")
    if code:
        patterns.append("*.py")
    if need == "weights":
        patterns += ["*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigError(
            f"model {repo!r}: the hub has no such repository, or it is private ({first_line(error)}); "
            f"known presets: {', '.join(presets())}"
        ) from None
    except Exception as error:  # noqa: BLE001  httpx's, the system's and the hub's own errors share no base class
        raise TargetError(
            f"model {repo!r}: not in the local hub cache, and the hub cannot be reached ({first_line(error)}); "
            f"copy the checkpoint here and give its directory, or use --load-format dummy for made-up weights"
        ) from None
