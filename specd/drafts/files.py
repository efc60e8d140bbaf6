"""Draft directories: written as a whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from specd.drafts.directory import WEIGHTS
from specd.errors import CheckpointError
from specd.protocol.contract import is_file_name

logger = logging.getLogger(__name__)


def write_draft(path: Path, config: dict[str, Any], weights: Mapping[str, Tensor], files: Mapping[str, bytes]) -> None:
    """Write config.json, model.safetensors and `files` (tokenizer and the like) to the directory `path`.

    It appears whole, in place of what was there before. Raises CheckpointError when it cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            new = scratch / "new"
            new.mkdir()
            for name, content in files.items():
                assert is_file_name(name), "the target's files are checked when they are fetched"
                (new / name).parent.mkdir(exist_ok=True)
                (new / name).write_bytes(content)
            (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
            # safetensors lets nobody else read it, but who serves a draft need not be who trained it.
            (new / WEIGHTS).chmod((new / "config.json").stat().st_mode)
            for file in new.rglob("*"):
                sync(file)
            if path.exists():
                path.rename(scratch / "old")
            new.rename(path)
            sync(path.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write the draft to {str(path)!r}: {error}") from None
    logger.debug("draft of %d parameters written to %s", sum(tensor.numel() for tensor in tensors.values()), path)


def sync(path: Path) -> None:
    """Force a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
