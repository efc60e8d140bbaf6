"""A draft's directory, whoever published it: where it is, its config.json, its files, and a digest of both."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from specd.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def draft_directory(path: Path | str) -> Path:
    """The directory of the draft that `path` means: `path` itself, or the one in it if it is a run's."""
    inside = Path(path, "draft")
    return inside if (inside / "config.json").is_file() else Path(path)


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of the draft in `path`. Raises CheckpointError for a directory that holds no draft."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} is no draft directory: {error}; expected config.json and {WEIGHTS} in it"
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"config.json in {str(path)!r} holds a {type(config).__name__}, expected an object")
    return config


def weight_files(path: Path) -> list[Path]:
    """The files of its weights, one or as many as its index names. Raises CheckpointError when they are not there.

    Pickled weights are not read: that would run whatever code is in them.
    """
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if (path / INDEX).is_file():
        try:
            names = set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{str(path / INDEX)!r} is no index of weights: {error!r}") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (path / name).is_file():
                raise CheckpointError(
                    f"{str(path / INDEX)!r} names {name!r}: expected a file of that name beside it; fetch all of them"
                )
        return [path / name for name in sorted(names)]
    pickled = sorted(file.name for file in path.glob("*") if file.suffix in _PICKLED)
    if pickled:
        raise CheckpointError(
            f"{str(path)!r} has pickled weights, {', '.join(pickled)}: reading them could run code, so specd expects "
            f"{WEIGHTS}; if you trust their author, write it there with:\n{conversion(pickled)}"
        )
    raise CheckpointError(f"{str(path)!r} is no draft directory: expected {WEIGHTS} or {INDEX} in it")


def conversion(names: list[str]) -> str:
    """The command that turns pickled weights into a safetensors file, run in their directory."""
    return (
        'python -c "import torch; from safetensors.torch import save_file; weights = {}; '
        f"[weights.update(torch.load(name, map_location='cpu', weights_only=True)) for name in {names}]; "
        f"save_file({{name: one.contiguous().clone() for name, one in weights.items()}}, '{WEIGHTS}')\""
    )


def digest(path: Path) -> str:
    """SHA-256 of config.json and weights in `path`, hexadecimal: the same wherever the directory lies."""
    total = hashlib.sha256()
    for file in (path / "config.json", *weight_files(path)):
        try:
            with file.open("rb") as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
        except OSError as error:
            raise CheckpointError(f"{str(path)!r} is no draft directory: {error}") from None
    return total.hexdigest()
