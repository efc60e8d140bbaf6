"""The weights in a draft's directory: read from all its files, under the names of its module, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from specd.drafts.directory import weight_files
from specd.errors import CheckpointError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32)


def read_weights(path: Path, prefixes: Mapping[str, str], surplus: tuple[str, ...]) -> dict[str, Tensor]:
    """All tensors in `path` by the names of a draft's module, on the CPU.

    prefixes: how others begin a name, and how this module does, tried in order and each once. surplus: ends of names
    of tensors that other readers want, which say nothing of the draft. Raises CheckpointError for damaged files and
    for two tensors of one name.
    """
    found: dict[str, Tensor] = {}
    for file in weight_files(path):
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{str(path)!r} is no draft directory: {file.name}: {error}; expected safetensors"
            ) from None
        for published, tensor in tensors.items():
            name = published
            for other, own in prefixes.items():
                if name.startswith(other):
                    name = own + name.removeprefix(other)
            if name.endswith(surplus):
                continue
            if name in found:
                raise CheckpointError(f"{str(path)!r}: two of its tensors mean {name!r}; expected one")
            found[name] = tensor
    return found


def fill(module: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Load `weights` into `module`. Raises CheckpointError unless they are exactly its own, and finite numbers."""
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if odd := sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name)):
        name = odd[0]
        raise CheckpointError(
            f"{where!r}: {len(odd)} tensors differ from what its config.json asks for, first {name!r}: found "
            f"{list(found[name]) if name in found else 'none'}, expected {list(own[name]) if name in own else 'none'}"
        )
    for name, tensor in module.state_dict().items():
        kinds = _FLOATS if tensor.dtype in _FLOATS else _INTEGERS
        if weights[name].dtype not in kinds:
            raise CheckpointError(
                f"{where!r}: {name} is {_named(weights[name].dtype)}, expected {', '.join(map(_named, kinds))}; "
                f"write the draft again in one of them"
            )
    module.load_state_dict(dict(weights))
    for name, parameter in module.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise CheckpointError(
                f"{where!r}: {name} has values that are no finite float32 numbers: the draft is damaged, or its "
                f"training diverged; take an earlier one"
            )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
