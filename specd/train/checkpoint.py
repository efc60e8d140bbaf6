"""Atomic checkpoints of a training run: weights, AdamW moments, RNG states and the place in the data.

A checkpoint is a directory `step-00000123` with `model.safetensors`, `optimizer.safetensors` and `state.json`, written
under another name, synced and renamed: it exists whole or not at all. `state.json` holds size and crc32 of the others.
The draft of that step, as engines read it, lies in `draft/`.
"""

from __future__ import annotations

import logging
import os
import random
import re
import shlex
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from specd.drafts.files import sync
from specd.errors import CheckpointError, writing

logger = logging.getLogger(__name__)

FORMAT = 1
STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")
BEST = "best"
"""A link to the checkpoint with the lowest held-out loss."""


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run stands: optimizer steps done, and the first batch of the data plan that no step has trained."""

    step: int = 0
    epoch: int = 0
    index: int = 0


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What must be equal on resume. target: the fingerprint. settings: flat `a.b` names and plain values."""

    target: str
    settings: dict[str, Any]


class RngStates(msgspec.Struct, frozen=True, kw_only=True):
    """The states of all global random generators; the tensors are uint8."""

    torch_cpu: torch.Tensor
    torch_cuda: tuple[torch.Tensor, ...]
    python: Any
    numpy: Any

    @classmethod
    def capture(cls) -> RngStates:
        """The states as they are now."""
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else ()
        kind, keys, *rest = np.random.get_state(legacy=True)
        return cls(
            torch_cpu=torch.get_rng_state(),
            torch_cuda=cuda,
            python=random.getstate(),
            numpy=(kind, np.asarray(keys).tolist(), *rest),
        )

    def restore(self) -> None:
        """Restore the states. CUDA devices that the checkpoint does not know keep theirs."""
        torch.set_rng_state(self.torch_cpu)
        for device, state in enumerate(self.torch_cuda[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
        version, internal, gauss = self.python
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = self.numpy
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    nbytes: int
    crc32: int


class _Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: int
    position: Position
    identity: Identity
    python_rng: Any
    numpy_rng: Any
    files: dict[str, _File]


class Checkpoints:
    """The checkpoints of one run directory. keep: how many of the newest stay on disk.

    export: writes the draft of a step to a directory, in the form that engines read; None for checkpoints without one.
    """

    __slots__ = ("directory", "export", "identity", "keep")

    def __init__(self, directory: Path, identity: Identity, keep: int = 2) -> None:
        if keep < 1:
            raise CheckpointError(f"train.keep is {keep}: at least one checkpoint must stay")
        self.directory = directory
        self.identity = identity
        self.keep = keep
        self.export: Callable[[Path, int], None] | None = None

    def __repr__(self) -> str:
        return f"Checkpoints({str(self.directory)!r}, steps={[step for step, _ in self._complete()]})"

    def save(
        self, position: Position, module: torch.nn.Module, optimizer: torch.optim.Optimizer, rng: RngStates
    ) -> Path:
        """Write the checkpoint of `position` and drop the oldest beyond `keep`; one that exists already is left alone.

        Raises CheckpointError when it cannot be written; the earlier ones are then untouched.
        """
        final = self.directory / f"step-{position.step:08d}"
        if _state(final) is not None:
            return final
        partial = self.directory / f".partial-{final.name}-{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clear_partial()
            shutil.rmtree(final, ignore_errors=True)
            partial.mkdir()
            mode = partial.stat().st_mode & 0o666
            save_file(_host(_weights(module)), partial / "model.safetensors")
            save_file(_host(_moments(module, optimizer) | _rng_tensors(rng)), partial / "optimizer.safetensors")
            for path in partial.iterdir():
                path.chmod(mode)  # safetensors lets nobody else read it
            files = {path.name: _seal(path) for path in sorted(partial.iterdir())}
            if self.export is not None:
                self.export(partial / "draft", position.step)
                for path in (partial / "draft").rglob("*"):
                    sync(path)
            state = _Manifest(
                format=FORMAT,
                position=position,
                identity=self.identity,
                python_rng=rng.python,
                numpy_rng=rng.numpy,
                files=files,
            )
            (partial / STATE).write_bytes(msgspec.json.encode(state))
            _seal(partial / STATE)
            sync(partial)
            partial.rename(final)
            sync(self.directory)
        except (OSError, SafetensorError, CheckpointError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(
                f"cannot write checkpoint {final}: {error}; free some space there, then go on with `{self._resume}`"
            ) from None
        best = self.best()
        for _, old in self._complete()[: -self.keep]:
            if old != best:
                shutil.rmtree(old, ignore_errors=True)
        return final

    def best(self) -> Path | None:
        """The checkpoint that is marked as the best one."""
        try:
            path = self.directory / (self.directory / BEST).readlink()
        except OSError:
            return None
        return path if _state(path) is not None else None

    def mark_best(self, step: int) -> None:
        """Mark the checkpoint of `step` as the best one: it stays until another one is marked, whatever `keep` is.

        Raises CheckpointError when that cannot be written.
        """
        fresh = self.directory / f".{BEST}-{os.getpid()}"
        with writing(self.directory / BEST):
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(f"step-{step:08d}")
            fresh.replace(self.directory / BEST)
            sync(self.directory)

    def load_weights(self, path: Path, module: torch.nn.Module) -> None:
        """Load the weights of a checkpoint, and nothing else of it. Raises as `restore`."""
        weights, _ = self._read(path, self.compare(path))
        _check_shapes(path, weights, _weights(module))
        module.load_state_dict(weights, strict=False)

    def latest(self) -> Path:
        """The newest complete checkpoint; torn ones are skipped. Raises CheckpointError when there is none."""
        complete = self._complete()
        if not complete:
            torn = len([path for path in self.directory.glob("*step-*") if path.is_dir()])
            raise CheckpointError(
                f"no complete checkpoint in {self.directory} ({torn} torn): begin the run anew, in another --output"
            )
        return complete[-1][1]

    def step(self) -> int:
        """The step of the newest complete checkpoint, 0 if there is none."""
        return max((step for step, _ in self._complete()), default=0)

    def compare(self, path: Path) -> _Manifest:
        """The state of a checkpoint. Raises CheckpointError when another target, draft or data plan made it."""
        state = _state(path)
        if state is None:
            raise CheckpointError(
                f"{path} is no complete checkpoint: delete it, and `{self._resume}` goes on from the one before"
            )
        _compare(path, state.identity, self.identity)
        return state

    def restore(self, path: Path, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Position:
        """Load a checkpoint into `module`, `optimizer` and the global random generators; return its position.

        Raises CheckpointError, before anything is changed, when it is corrupt or belongs to another target, draft or
        data plan; the message names what differs.
        """
        state = self.compare(path)
        weights, extra = self._read(path, state)
        _check_shapes(path, weights, _weights(module))
        module.load_state_dict(weights, strict=False)
        _load_moments(module, optimizer, extra)
        cuda = sorted((name for name in extra if name.startswith("rng.cuda.")), key=lambda name: int(name[9:]))
        RngStates(
            torch_cpu=extra["rng.cpu"],
            torch_cuda=tuple(extra[name] for name in cuda),
            python=state.python_rng,
            numpy=state.numpy_rng,
        ).restore()
        return state.position

    def _read(self, path: Path, state: _Manifest) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Weights, and what else there is. Raises CheckpointError when they are corrupt."""
        for name, file in state.files.items():
            if _crc32(path / name) != file.crc32:
                raise CheckpointError(
                    f"{path / name} is corrupt (its checksum differs): delete {path}, and "
                    f"`{self._resume}` goes on from the one before"
                )
        try:
            return load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}; delete it, and `{self._resume}` goes on from the one before"
            ) from None

    @property
    def _resume(self) -> str:
        return f"specd resume {shlex.quote(str(self.directory.parent))}"

    def _complete(self) -> list[tuple[int, Path]]:
        return finished_checkpoints(self.directory)

    def _clear_partial(self) -> None:
        """Remove partial checkpoints of a killed run: the directory has one owner, so no other process writes there."""
        for path in self.directory.glob(".partial-*"):
            shutil.rmtree(path, ignore_errors=True)


def finished_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Step and directory of all complete checkpoints in a run's `checkpoints`, in order."""
    named = ((path, _NAME.fullmatch(path.name)) for path in directory.glob("step-*"))
    return sorted((int(match[1]), path) for path, match in named if match and _state(path) is not None)


def _state(path: Path) -> _Manifest | None:
    """The state of a checkpoint, None unless all its files are there in full length."""
    try:
        state = msgspec.json.decode((path / STATE).read_bytes(), type=_Manifest)
        whole = all((path / name).stat().st_size == file.nbytes for name, file in state.files.items())
    except (OSError, msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError):
        return None
    return state if whole and state.format == FORMAT else None


PLAN = frozenset({"train.epochs", "train.max_steps", "train.max_minutes"})
"""Settings of an identity that say how long a run goes on: a resumed run may have others, by a new plan."""
_BEFORE = {
    "capture.dtype": "auto", "data.columns": {}, "data.date": "", "data.long": "cut", "data.packing": "anew",
    "data.subset": "", "data.weights": [], "draft.loss": "decay", "draft.dpace_alpha": 0.5, "validation.share": 0.0,
}  # fmt: skip
"""Settings that runs of specd 0.1.0 do not name, and what they did."""


def _compare(path: Path, old: Identity, new: Identity) -> None:
    if old.target != new.target:
        raise CheckpointError(
            f"cannot resume {path}: it was trained on target {old.target}, the daemon hosts {new.target}: "
            f"start the daemon with the first, or train the second in a new --output"
        )
    # Through JSON, so that tuples and lists of the same values are equal.
    now = msgspec.json.decode(msgspec.json.encode(new.settings))
    keys = old.settings.keys() | now.keys()
    if "method" not in old.settings:
        # Made by specd 0.1.0: DFlash was its only method, and the -1 of a mask token that its recipe chose is all that
        # it stored of it, so that one cannot be compared.
        keys -= {"method", "draft.mask_token_id"} if old.settings.get("draft.mask_token_id") == -1 else {"method"}
    keys -= PLAN
    before = _BEFORE | old.settings
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in sorted(keys) if before.get(key) != now.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"cannot resume {path}: {'; '.join(changed)}: "
            f"give the old values back, or start a new run in another --output"
        )


def _check_shapes(path: Path, saved: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    for name in sorted(saved.keys() | wanted.keys()):
        old = tuple(saved[name].shape) if name in saved else None
        new = tuple(wanted[name].shape) if name in wanted else None
        if old != new:
            raise CheckpointError(
                f"cannot resume {path}: weight {name} has shape {old} there and {new} in this draft: "
                f"use the draft settings it was made with, or start a new run in another --output"
            )


def saved_tensors(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that change as a run goes on, where they lie: weights and moments."""
    return _weights(module) | _moments(module, optimizer)


def _weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors to save: trained parameters and persistent buffers, not the target's frozen embedding and head."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def _names(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the order of the optimizer's state dict."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _moments(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    names = _names(module, optimizer)
    return {f"adam.{key}.{names[i]}": value for i, moments in state.items() for key, value in moments.items()}


def _load_moments(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    order = {name: i for i, name in enumerate(_names(module, optimizer))}
    state: dict[int, dict[str, torch.Tensor]] = optimizer.state_dict()["state"]
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, moment, name = key.split(".", 2)
            state[order[name]] = state.get(order[name], {}) | {moment: value}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _rng_tensors(rng: RngStates) -> dict[str, torch.Tensor]:
    return {"rng.cpu": rng.torch_cpu} | {f"rng.cuda.{i}": state for i, state in enumerate(rng.torch_cuda)}


def _host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            crc = zlib.crc32(chunk, crc)
    return crc


def _seal(path: Path) -> _File:
    """fsync a written file; returns its size and crc32."""
    sync(path)
    return _File(nbytes=path.stat().st_size, crc32=_crc32(path))
