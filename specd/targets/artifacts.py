"""Artifacts of a real checkpoint: the files and tensors that trainers fetch, and the contract that lists them."""

from __future__ import annotations

import hashlib
import json
import threading
from typing import Any

import torch

from specd.protocol.contract import ArtifactRef, TargetContract
from specd.targets.base import tap_layers
from specd.targets.source import TOKENIZER_FILES, Source


class Artifacts:
    """A target's files by name, and its tensors `embedding` and `lm_head`, both [V, H], as bytes.

    Thread-safe. A tensor on a GPU is copied to the host on the first read, and kept there.
    """

    __slots__ = ("_bytes", "_lock", "_tensors", "files")

    def __init__(self, source: Source, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """config: the content of `config.json`. The tokenizer's files are the source's."""
        self.files = {"config.json": json.dumps(config, indent=2).encode()}
        for name in TOKENIZER_FILES:
            if (data := source.file(name)) is not None:
                self.files[name] = data
        self._tensors = tensors
        self._bytes: dict[str, memoryview] = {}
        self._lock = threading.Lock()

    def read(self, name: str) -> memoryview:
        """The bytes of one artifact. Raises KeyError for an unknown name."""
        with self._lock:
            if name in self.files:
                return memoryview(self.files[name])
            if name not in self._bytes:
                host = self._tensors[name].detach().cpu().contiguous()
                self._bytes[name] = host.view(-1).view(torch.uint8).numpy().data.toreadonly()
            return self._bytes[name]

    def contract(self, source: Source, text_config: Any, model_type: str, dtype: str, weights: str) -> TargetContract:
        """The target's contract. text_config: transformers' config of the language model; weights: their digest."""
        refs = {file: ArtifactRef(nbytes=len(data)) for file, data in self.files.items()}
        tied = self._tensors["embedding"].data_ptr() == self._tensors["lm_head"].data_ptr()
        for key, tensor in self._tensors.items():
            refs[key] = ArtifactRef(
                nbytes=tensor.nbytes,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                same_as="embedding" if tied and key == "lm_head" else "",
            )
        template = self.files.get("chat_template.jinja", b"")
        if not template and "tokenizer_config.json" in self.files:
            inline = json.loads(self.files["tokenizer_config.json"]).get("chat_template")
            template = json.dumps(inline).encode() if inline else b""
        apart = {"config.json", "generation_config.json", "chat_template.jinja"}
        return TargetContract(
            model=source.name,
            model_type=model_type,
            hidden_size=text_config.hidden_size,
            num_layers=text_config.num_hidden_layers,
            vocab_size=text_config.vocab_size,
            dtype=dtype,
            weights=weights,
            tokenizer=_digest(*(data for file, data in sorted(self.files.items()) if file not in apart)),
            chat_template=_digest(template) if template else "",
            tap_layers=tap_layers(getattr(text_config, "layer_types", None) or ()),
            artifacts=refs,
        )

    def close(self) -> None:
        """Release the tensors. Idempotent."""
        with self._lock:
            self._tensors, self._bytes = {}, {}


def _digest(*parts: bytes) -> str:
    """Digest of some files' bytes; empty for none."""
    if not parts:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
