"""Artifacts of a real checkpoint: the files and tensors that trainers fetch, and the contract that lists them."""

from __future__ import annotations

import json
import threading
from typing import Any

import msgspec
import torch

from specd.protocol.contract import ArtifactRef, TargetContract
from specd.targets.digest import text_digests
from specd.targets.source import Source
from specd.targets.transforms import Transforms


class Artifacts:
    """A target's files by name, and its tensors `embedding` and `lm_head`, both [V, H], as bytes.

    Thread-safe. A tensor on a GPU is copied to the host on the first read, and kept there.
    """

    __slots__ = ("_bytes", "_lock", "_tensors", "files")

    def __init__(self, source: Source, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """config: the content of `config.json`. The tokenizer's files are the source's."""
        self.files = {"config.json": json.dumps(config, indent=2).encode(), **source.files()}
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

    def contract(
        self,
        source: Source,
        text_config: Any,
        model_type: str,
        dtype: str,
        weights: str,
        transforms: Transforms,
    ) -> TargetContract:
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
        tokenizer, chat_template = text_digests(self.files)
        return TargetContract(
            model=source.name,
            model_type=model_type,
            hidden_size=text_config.hidden_size,
            num_layers=text_config.num_hidden_layers,
            vocab_size=text_config.vocab_size,
            dtype=dtype,
            weights=weights,
            tokenizer=tokenizer,
            chat_template=chat_template,
            revision="" if weights.startswith("dummy-") else source.revision,
            artifacts=refs,
            **msgspec.structs.asdict(transforms),
        )

    def close(self) -> None:
        """Release the tensors. Idempotent."""
        with self._lock:
            self._tensors, self._bytes = {}, {}
