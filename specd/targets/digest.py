"""Digests of a target's weights, tokenizer and chat template, cheap enough for every start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specd.errors import TargetError
from specd.protocol.contract import TEMPLATES

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


def text_digests(files: Mapping[str, bytes]) -> tuple[str, str]:
    """Digests of the tokenizer and of its chat templates among a target's `files`; empty for what is not there."""
    template = files.get("chat_template.jinja", b"")
    if not template and "tokenizer_config.json" in files:
        inline = json.loads(files["tokenizer_config.json"]).get("chat_template")
        template = json.dumps(inline).encode() if inline else b""
    template = template or files.get("chat_template.json", b"")
    further = sorted(item for item in files.items() if item[0].startswith(TEMPLATES))
    apart = {
        "config.json", "generation_config.json", "chat_template.jinja", "chat_template.json",
        "preprocessor_config.json", *dict(further),
    }  # fmt: skip
    own = [data for name, data in sorted(files.items()) if name not in apart]
    templates = (template, *(part for name, data in further for part in (name.encode(), data)))
    return _digest(*own), _digest(*templates) if any(templates) else ""


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


def _digest(*parts: bytes) -> str:
    """Digest of some files' bytes; empty for none."""
    if not parts:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
