"""Digests of a target's weights, cheap enough for every start."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from specd.errors import TargetError

DUMMY_SEED = 0
_SAMPLE_BYTES = 1 << 20
_SAMPLES = 16


def weights_digest(path: Path) -> str:
    """Digest of the checkpoint in `path`, from samples of its files.

    Covers config.json, and of each safetensors file its name, size, header and 16 evenly spread samples of 1 MiB: two
    checkpoints that differ only between the samples share a digest, training another step always changes it.
    """
    digest = hashlib.blake2b((path / "config.json").read_bytes(), digest_size=16)
    if not (files := sorted(path.glob("*.safetensors"))):
        raise TargetError(f"{path} holds no *.safetensors file; save the target with save_pretrained()")
    for file in files:
        hash_file(digest, file)
    return digest.hexdigest()


def dummy_digest(config: dict[str, Any], device_type: str) -> str:
    """Digest of the dummy weights of `_dummy_model`: config, seed, and device type of their generator."""
    identity = json.dumps([config, DUMMY_SEED, device_type], sort_keys=True)
    return "dummy-" + hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


def hash_file(digest: hashlib.blake2b, path: Path) -> None:
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
