"""The SGLang backend as a Target: merged prefills of SGLang's model runner, on one GPU or on several of one host."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, ClassVar, Final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from specd.config.settings import TargetConfig
from specd.errors import ConfigError, TargetError
from specd.protocol import payload
from specd.protocol.payload import Payload
from specd.targets.artifacts import Artifacts
from specd.targets.base import CaptureJob, Launched, check, recurrent, slot_rows
from specd.targets.digest import dummy_digest, weights_digest
from specd.targets.sglang.capture import Capture
from specd.targets.sglang.engine import Engine
from specd.targets.sglang.graphs import buckets
from specd.targets.sglang.plain import handed_on
from specd.targets.sglang.ranks import Ranks, free_port
from specd.targets.sglang.setup import AT_HEAD, RankSetup, Step
from specd.targets.sglang.touch_points import touch_points
from specd.targets.source import Source, dummy_config, pick_device, pick_dtype, resolve, with_tokenizer

DEFAULT_FRACTION: Final = 0.9
"""Share of the GPU's free memory for weights and KV cache; max_forward_tokens bounds the cache."""

GRAPHS_FRACTION: Final = 0.85
"""The same where prefill graphs and their states are to fit beside."""

LEAST_TOKENS: Final = 64
"""Smallest KV cache, in tokens: the self-check at start has to fit."""


class SGLangTarget:
    """A causal LM of SGLang as a Target, on one GPU or, with tensor parallelism, on several of one host.

    Rank 0 runs here, the others in processes of their own; rank 0 alone captures. FP8 checkpoints stay FP8.
    Raises ConfigError or TargetError when SGLang or the model cannot be used.
    """

    settings: ClassVar[frozenset[str]] = frozenset(
        {"tokenizer", "tp", "memory_fraction", "attention_backend", "prefill_graphs"}
    )

    def __init__(self, config: TargetConfig) -> None:
        graphs = buckets(config.prefill_graphs, config.max_forward_tokens, touch_points())
        dummy = config.load_format == "dummy"
        source = with_tokenizer(resolve(config.model, need="shape" if dummy else "weights"), config.tokenizer)
        place = pick_device(config.device)
        gpu = _place(place, config.tp)
        if config.num_layers and not dummy:
            raise ConfigError(
                f"num_layers={config.num_layers}: real weights keep all their layers; use --load-format dummy"
            )
        self._name = source.name
        self._device = torch.device("cuda", gpu) if place.type == "cuda" else place
        self.device = str(self._device)
        published = source.config
        if dummy:
            kept = {key: value for key, value in source.config.items() if key == "quantization_config"}
            published = dummy_config(source, config.num_layers) | kept
        if not published.get("architectures"):
            raise TargetError(f"config.json of {source.name} names no architectures, by which SGLang knows its models")
        self._tp = config.tp
        capacity = max(config.max_forward_tokens, LEAST_TOKENS)
        self._context = min(capacity, _context(published))
        self._max_tokens = config.max_forward_tokens
        with contextlib.ExitStack() as stack:
            path = source.path
            if path is None or dummy:
                path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="specd-")))
                (path / "config.json").write_text(json.dumps(published))
            setup = RankSetup(
                path=str(path),
                load_format=config.load_format,
                dtype=str(pick_dtype(config.dtype, source)).removeprefix("torch."),
                device=place.type,
                gpu=gpu,
                tp=config.tp,
                port=free_port(),
                memory_fraction=config.memory_fraction or (GRAPHS_FRACTION if graphs else DEFAULT_FRACTION),
                attention_backend="" if config.attention_backend == "auto" else config.attention_backend,
                max_tokens=capacity,
                context=self._context,
                prefill_graphs=graphs,
            )
            self._ranks = Ranks(setup)
            self._engine: Engine | None = None
            try:
                with _explained(source.name, self.device):
                    self._engine = Engine(setup)
                    self._check_states(source)
                    tensors = self._engine.weights()
                    self._artifacts = Artifacts(source, published, tensors)
                    transforms = self._engine.transforms(tensors["embedding"])
                text = self._engine.runner.model_config.hf_text_config
                if dummy or source.path is None:
                    digest = dummy_digest(published, f"sglang-{place.type}-{config.tp}")
                else:
                    digest = weights_digest(source.path)
                dtype = str(self._engine.runner.dtype).removeprefix("torch.")
                kind = str(source.config["model_type"])
                contract = self._artifacts.contract(source, text, kind, dtype, digest, transforms)
                self.contract = msgspec.structs.replace(contract, payloads=self._engine.images.names)
            except BaseException:
                self._release()
                raise

    def run(self, fills: Sequence[CaptureJob]) -> Launched | None:
        """See Target.run. With several ranks a failed forward ends the process: the others would wait for ever."""
        if self._engine is None:
            raise TargetError(f"target {self._name} is closed")
        spec = check(self.contract, fills)
        lengths = [int(length) for fill in fills for length in fill.lengths]
        self._admit(lengths)
        brought = [each for fill in fills for each in fill.payloads or ({},) * fill.lengths.size]
        brought = brought if any(brought) else []
        tokens = np.concatenate([fill.tokens for fill in fills])
        bounds = list(pairwise(accumulate((int(fill.tokens.size) for fill in fills), initial=0)))
        slots = list(zip(bounds, map(slot_rows, fills), strict=True))
        capture = Capture(
            taps={tap: [(start, end, slot.taps[k]) for (start, end), slot in slots] for k, tap in enumerate(spec.taps)},
            final=[(start, end, slot.final) for (start, end), slot in slots if slot.final is not None],
        )
        stop = AT_HEAD if spec.final else spec.taps[-1]
        try:
            first = 0
            for start, end, share in _shares(lengths, self._engine.max_sequences):
                part, own = tokens[start:end], brought[first : first + len(share)]
                first += len(share)
                own = own if any(own) else []
                self._send(part, share, stop, spec.taps, own)
                self._engine.forward(part, share, stop, capture.rows(start, end, own))
        except RuntimeError as error:
            if self._tp > 1:
                raise
            if self._device.type == "cuda":
                # A CUDA fault poisons the process: only running out of memory leaves the target alive there, and
                # images that the encoder does not take, after which the device still answers.
                if not isinstance(error, torch.OutOfMemoryError) and not brought:
                    raise
                torch.cuda.synchronize(self._device)
            raise TargetError(f"target {self._name}: a forward of {tokens.size} tokens failed: {error}") from error
        if self._device.type != "cuda":
            return None
        return Launched(self._device)

    def _send(
        self, tokens: NDArray[np.int32], lengths: list[int], stop: int, taps: tuple[int, ...], brought: list[Payload]
    ) -> None:
        """Have the other ranks run a forward. Raises TargetError for images that would end them."""
        assert self._engine is not None
        if self._tp == 1:
            return
        if brought:
            self._engine.images.inputs(tokens, lengths, brought)
        payloads = tuple(map(payload.pack, brought))
        ids = tokens.astype("<i4").tobytes()
        self._ranks.send(Step(tokens=ids, lengths=lengths, stop=stop, taps=taps, payloads=payloads))

    def plain_states(self, tokens: NDArray[np.int32]) -> NDArray[np.float32] | None:
        """See trial.Witness."""
        assert self._engine is not None
        step = Step(tokens=tokens.astype("<i4").tobytes(), lengths=[int(tokens.size)], stop=AT_HEAD)
        return handed_on(self._engine, tokens, lambda: self._ranks.send(step))

    def artifact(self, name: str) -> memoryview:
        """See Target.artifact."""
        return self._artifacts.read(name)

    def close(self) -> None:
        """See Target.close."""
        self._artifacts.close()
        self._release()

    def _release(self) -> None:
        """End the ranks and the engine, if there is one. Idempotent."""
        engine, self._engine = self._engine, None
        self._ranks.release()
        if engine is not None:
            engine.close()
        self._ranks.close()

    def _check_states(self, source: Source) -> None:
        assert self._engine is not None
        if not self._engine.states and (why := recurrent(source.config)):
            raise TargetError(
                f"target {source.name} has recurrent layers ({why}), for which this SGLang has no pool of states: its "
                f"sequences would share one; use --backend transformers, where they run one by one"
            )

    def _admit(self, lengths: Sequence[int]) -> None:
        for what, seen, most, remedy in (
            ("tokens", sum(lengths), self._max_tokens, "raise target.max_forward_tokens or send smaller batches"),
            ("tokens in one sequence", max(lengths), self._context, "cut the samples (data.max_length)"),
        ):
            if seen > most:
                raise TargetError(f"target {self._name}: {seen} {what}, at most {most} fit its forward; {remedy}")


def _shares(lengths: list[int], most: int) -> Iterator[tuple[int, int, list[int]]]:
    """Forwards of up to `most` sequences each: first token, end and lengths."""
    start = 0
    for first in range(0, len(lengths), most):
        share = lengths[first : first + most]
        yield start, (start := start + sum(share)), share


def _place(place: torch.device, tp: int) -> int:
    """Index of the first GPU, which is rank 0's; 0 on the CPU."""
    if place.type != "cuda":
        if os.environ.get("SGLANG_USE_CPU_ENGINE") != "1":
            raise ConfigError(
                f"device {str(place)!r}: SGLang runs there only with SGLANG_USE_CPU_ENGINE=1 in the environment; "
                f"give a GPU or use --backend transformers"
            )
        return 0
    first = torch.cuda.current_device() if place.index is None else place.index
    if first + tp > (found := torch.cuda.device_count()):
        raise ConfigError(
            f"target.tp={tp} from cuda:{first} on: this process sees {found} CUDA devices; lower --tp or --device"
        )
    return first


def _context(config: dict[str, Any]) -> int:
    text = config.get("text_config") or config
    return int(text.get("max_position_embeddings") or 1 << 20)


@contextlib.contextmanager
def _explained(name: str, device: str) -> Iterator[None]:
    """Turn SGLang's errors while it loads into one TargetError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TargetError(
            f"target {name} does not fit in the memory of {device}: {error}; free some, or spread it with --tp"
        ) from None
    except (
        OSError,
        ValueError,
        LookupError,
        NameError,
        TypeError,
        RuntimeError,
        ImportError,
        AssertionError,
        AttributeError,
    ) as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise TargetError(f"target {name}: SGLang cannot load it: {line}") from error
