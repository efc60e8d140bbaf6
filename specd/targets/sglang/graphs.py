"""Prefill graphs of SGLang's, recorded with the states of every layer, and what a replay leaves in fixed memory.

SGLang records the decoder in pieces, one for each bucket of tokens, broken at attention, which runs on the batch as it
is. No hook runs in a replay, so those that write states are recorded with it, of all layers: which are tapped is known
only once a trainer comes, when other threads use the GPU and nothing can be recorded any more.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from specd.errors import ConfigError, TargetError, first_line
from specd.targets.sglang.official import Official
from specd.targets.sglang.setup import RankSetup
from specd.targets.sglang.versions import GRAPHS, SGLang, layer_output

log = logging.getLogger(__name__)

BUCKETS: Final = (256, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 2560, 3072, 3584, 4096)
"""Tokens of a recorded forward, of which a smaller one is padded to the next: by less than half. What is longer is not
bound by its launches."""

LEAST: Final = 128
"""Smallest bucket: forwards below half of it are never replayed, which leaves the trials of a target to its hooks."""

FAR: Final = 0.03
"""Mean distance of a replay's states from the same layer's without graphs, relative to their norm, that is none of a
layer's own rounding: kernels sum in another order for a bucket than for the tokens in it."""


def buckets(asked: bool | tuple[int, ...], max_tokens: int, sg: SGLang) -> tuple[int, ...]:
    """The buckets to record, ascending; none without graphs. max_tokens: of a forward. Raises ConfigError."""
    if asked is False or asked == ():
        return ()
    if sg.version < GRAPHS:
        found, first = (".".join(map(str, version)) for version in (sg.version, GRAPHS))
        raise ConfigError(
            f"target.prefill_graphs: sglang {found} is installed, expected {first} or newer; install that, or "
            f"turn them off"
        )
    if max_tokens < LEAST:
        raise ConfigError(
            f"target.prefill_graphs: target.max_forward_tokens={max_tokens}, expected at least {LEAST}; raise it, or "
            f"turn them off"
        )
    if asked is True:
        return (*(size for size in BUCKETS if size < max_tokens), *(() if max_tokens > BUCKETS[-1] else (max_tokens,)))
    wrong = [size for size in asked if not LEAST <= size <= max_tokens]
    if wrong:
        raise ConfigError(
            f"target.prefill_graphs: a graph of {wrong[0]} tokens, expected {LEAST} to target.max_forward_tokens="
            f"{max_tokens}"
        )
    return tuple(sorted(set(asked)))


class PrefillGraphs:
    """The graphs of one rank, and memory [L, T, H] for the states of all layers: T tokens of the largest bucket.

    Rank 0 alone has that memory. While graphs are `on`, a forward that fits a bucket is replayed.
    """

    __slots__ = ("_layers", "_memory", "_runner", "_setup", "_taps", "on")

    def __init__(self, runner: Any, layers: Sequence[torch.nn.Module], setup: RankSetup) -> None:
        self._runner, self._layers, self._setup = runner, layers, setup
        self._taps: tuple[int, ...] = ()
        self.on = True
        self._memory: torch.Tensor | None = None
        if setup.rank == 0:
            device = next(iter(layers[0].parameters())).device
            hidden = int(runner.model_config.hf_text_config.hidden_size)
            shape = len(layers), setup.prefill_graphs[-1], hidden
            self._memory = torch.empty(shape, dtype=runner.dtype, device=device)

    def replays(self, batch: Any) -> bool:
        """Whether SGLang replays this batch; the same on every rank."""
        return self.on and bool(self._runner.prefill_cuda_graph_runner.can_run_graph(batch))

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Run forwards without graphs meanwhile."""
        kept, self.on = self._runner.prefill_cuda_graph_runner, False
        self._runner.prefill_cuda_graph_runner = None
        try:
            yield
        finally:
            self._runner.prefill_cuda_graph_runner, self.on = kept, True

    def use(self, layers: Sequence[int]) -> None:
        """What `states` gives from now on."""
        self._taps = tuple(layers)

    def states(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The states of the layers in use after a replay, [T, H] each: the batch's rows, then others that are not."""
        return [torch.empty(0) if self._memory is None else self._memory[layer] for layer in self._taps]

    def check(self, forward: Callable[[NDArray[np.int32], Sequence[int]], torch.Tensor]) -> None:
        """Refuse replays of a padded batch whose states are not those of the same layers without graphs.

        forward: all states [L + 1, T, H] of tokens and the lengths of their sequences. Raises TargetError.
        """
        least = self._setup.prefill_graphs[0]
        size, longest = least * 7 // 8, min(self._setup.context, least // 2)
        lengths = [min(longest, size - start) for start in range(0, size, longest)]
        vocabulary = int(self._runner.model_config.hf_text_config.vocab_size)
        tokens = np.linspace(0, vocabulary - 1, size).astype(np.int32)
        with self.off():
            eager = forward(tokens, lengths)
        replayed = forward(tokens, lengths)
        if self._setup.rank == 0:
            compare(replayed, eager, type(self._runner.model).__name__)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Hooks of all layers, which write what they put out into this memory."""
        handles = [
            layer.register_forward_hook(self._hook(number), with_kwargs=True)
            for number, layer in enumerate(self._layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, number: int) -> Callable[..., Any]:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            hidden, residual, returned = layer_output(args, kwargs, output)
            if not isinstance(hidden, torch.Tensor) or hidden.ndim != 2:
                raise TargetError("its layers return neither (hidden, residual) nor hidden")
            if self._memory is not None:
                out = self._memory[number, : hidden.shape[0]]
                if residual is None:
                    out.copy_(hidden)
                else:
                    torch.add(hidden, residual, out=out)
            return returned

        return hook


Source = Official | PrefillGraphs
"""Where states come from that no hook of a layer's takes."""


def record(sg: SGLang, runner: Any, layers: Sequence[torch.nn.Module], setup: RankSetup) -> PrefillGraphs | None:
    """Have SGLang make its runners, with graphs where they are asked for: a collective.

    Raises TargetError where it records none, with what it says.
    """
    if not setup.prefill_graphs:
        runner.init_cuda_graphs()
        return None
    name, off = type(runner.model).__name__, "turn target.prefill_graphs off"
    graphs = PrefillGraphs(runner, layers, setup)
    try:
        with graphs.recorded():
            runner.init_cuda_graphs()
    except (RuntimeError, ImportError, AssertionError, TargetError) as error:
        raise TargetError(f"SGLang cannot record prefill graphs of its {name}: {first_line(error)}; {off}") from error
    made = runner.prefill_cuda_graph_runner
    if not isinstance(made, sg["PrefillCudaGraphRunner"]) or made.prefill_backend_name != "breakable":
        raise TargetError(
            f"SGLang records no prefill graphs of its {name} on {setup.device} that are broken at attention (its log "
            f"says why); {off}"
        )
    return graphs


def compare(replayed: torch.Tensor, eager: torch.Tensor, name: str) -> None:
    """Refuse states of a replay that are not those of the same layer without graphs. Both [L + 1, T, H], final last.

    A layer's own rounding stays far below what tells it from the layers beside it. Raises TargetError.
    """
    last = len(eager) - 1
    largest = 0.0
    for layer, states in enumerate(replayed):
        own = _distance(states, eager[layer])
        beside = [_distance(states, eager[other]) for other in (layer - 1, layer + 1) if 0 <= other < last > layer]
        largest = max(largest, own)
        if not own <= max(FAR, min([1.0, *beside]) / 2):
            place = f"layer {layer}" if layer < last else "the final norm"
            raise TargetError(
                f"SGLang's prefill graphs of {name} give other states after {place} than it does without them: they "
                f"differ by {own:.2g} of their norm; turn target.prefill_graphs off"
            )
    log.info("%s: states of prefill graphs differ from others by up to %.2g of their norm", name, largest)


def _distance(states: torch.Tensor, others: torch.Tensor) -> float:
    """The mean over rows, relative to the norm of `others`; NaN stays NaN."""
    exact, other = states.float(), others.float()
    return float(((exact - other).norm(dim=1) / other.norm(dim=1)).mean())
