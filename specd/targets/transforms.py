"""What a target does to rows of its embedding and to products with its lm_head, measured on its own modules.

Drafts read the embedding and learn from the logits, and config.json names such factors differently in each family, or
not at all. Shape legend: n probes, V vocabulary, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F

from specd.errors import first_line

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 8e-3, torch.float16: 2e-3}
"""Largest relative error of rounding, with which a figure counts as another; coarsest for any other dtype."""
PROBES = 4
SMALL, LARGE = 1e-2, 3e3
"""Root mean square of products: so small that no soft-cap bends them, and larger than any."""


class Transforms(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a TargetContract by these names."""

    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    odd_embedding: str = ""
    odd_logits: str = ""


class _Odd(Exception):
    """Something that is not of the form looked for, in words; never leaves this module."""


def measured(network: Any) -> Transforms:
    """Those of a causal LM of transformers, which may run no forward meanwhile: its decoder is stood in for."""
    config = network.config.get_text_config().to_dict()
    embedding = network.get_input_embeddings()
    found = of_embedding(embedding, embedding.weight, config)
    head = network.get_output_embeddings()
    weight = embedding.weight if head is None else head.weight
    try:
        found |= _logits(weight, _head_of(network), config)
    except _Odd as odd:
        found["odd_logits"] = str(odd)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        found["odd_logits"] = f"its logits could not be measured ({first_line(error)})"
    return Transforms(**found)


@torch.inference_mode()
def of_embedding(module: Callable[[Tensor], Any], weight: Tensor, config: Mapping[str, Any]) -> dict[str, Any]:
    """`embedding_scale` or `odd_embedding` of a module, int64 [n] -> [n, H], and its rows [V, H]."""
    ids = probe_ids(weight.shape[0]).to(weight.device)
    return of_rows(weight[ids], module(ids), config)


def of_rows(rows: Tensor, given: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The same of rows [n, H] for `probe_ids`, and of what the module gave for these."""
    if not isinstance(given, Tensor) or given.shape != rows.shape:
        return {"odd_embedding": f"its embedding gives {getattr(given, 'shape', type(given))}, not a row a token"}
    scale, error = _fit(rows.float(), given.float())
    if not (scale > 0 and error <= _tolerance(rows.dtype)):
        return {"odd_embedding": f"its embedding is no multiple of its rows (off by {error:.2g} of their size)"}
    return {"embedding_scale": named(scale, rows.dtype, config)}


def probe_ids(vocab_size: int) -> Tensor:
    """Tokens all over the vocabulary, int64."""
    return torch.linspace(0, vocab_size - 1, min(vocab_size, 64)).long()


@torch.inference_mode()
def _logits(weight: Tensor, head: Callable[[Tensor], Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """`logit_scale` and `logit_softcap`. weight [V, H]; head: final states [n, H] -> logits [n, V]. Raises _Odd."""
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(PROBES, weight.shape[1], generator=generator).to(weight.device)
    unit = F.linear(probes.to(weight.dtype), weight).float().square().mean().sqrt()
    if not 0 < unit < math.inf:
        raise _Odd("its lm_head is all zero, or not finite")
    most = float(unit) * torch.finfo(weight.dtype).max / 16  # states of more would overflow

    def at(size: float) -> tuple[Tensor, Tensor]:
        states = (probes * (size / unit)).to(weight.dtype)
        logits = head(states)
        if logits.shape != (PROBES, weight.shape[0]):
            raise _Odd(f"its logits are {list(logits.shape)}, expected [{PROBES}, {weight.shape[0]}]")
        return F.linear(states, weight).float(), logits.float()

    near = _tolerance(weight.dtype)
    if (still := head(torch.zeros_like(probes, dtype=weight.dtype))).any():
        raise _Odd(f"its lm_head has a bias (up to {float(still.abs().max()):.3g}), which trainers do not get")
    products, logits = at(SMALL)
    scale, error = _fit(products, logits)
    if not (scale > 0 and error <= near):
        raise _Odd(f"its logits are no multiple of the products with lm_head (off by {error:.2g} of their size)")
    scale, cap = named(scale, weight.dtype, config), 0.0
    large = min(LARGE / max(scale, 1.0), most)
    products, logits = at(large)
    if not _apart(products * scale, logits) <= near:
        cap = named(float(logits.abs().max()), weight.dtype, config)
        for size in (min(cap / scale, most), large):
            products, logits = at(size)
            error = _apart(cap * torch.tanh(products * scale / cap), logits)
            if not error <= 2 * near:
                raise _Odd(f"its logits are bent otherwise than by a soft-cap (off by {error:.2g} of their size)")
    return {"logit_scale": scale, "logit_softcap": cap}


def named(value: float, dtype: torch.dtype, config: Mapping[str, Any]) -> float:
    """`value`, measured in `dtype`: exactly 1, or what config.json says, where it is one of these but for rounding."""
    near = _tolerance(dtype)
    if abs(value - 1) < near:
        return 1.0
    known = [(abs(number / value - 1), number) for number in _numbers(config)]
    apart, closest = min(known, default=(1.0, value))
    return closest if apart < near else value


def _numbers(config: Mapping[str, Any]) -> Iterator[float]:
    """Figures that a target may multiply by: numbers of its config, 1 over them, and the root of its hidden size."""
    for value in config.values():
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 and math.isfinite(value):
            yield from (float(value), 1 / float(value))
    if isinstance(size := config.get("hidden_size"), int) and size > 0:
        yield math.sqrt(size)


def _head_of(network: Any) -> Callable[[Tensor], Tensor]:
    """A function from final states [n, H] to logits [n, V]: the network with something else in its decoder's place."""
    decoder = network.get_decoder()

    def head(states: Tensor) -> Tensor:
        decoder.forward = lambda *_, **__: _Given(states[None])
        try:
            ids = torch.zeros(1, states.shape[0], dtype=torch.int64, device=states.device)
            logits: Tensor = network(input_ids=ids, use_cache=False).logits[0]
            return logits
        finally:
            del decoder.forward

    return head


class _Given:
    """A decoder's output that has a final state and nothing else."""

    def __init__(self, state: Tensor) -> None:
        self.last_hidden_state = state

    def __getattr__(self, _: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return self.last_hidden_state if index == 0 else ()


def _fit(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The s with which s · one is closest to `other`, and how far apart they still are, over the size of `other`."""
    scale = float((one * other).sum(dtype=torch.float64) / one.square().sum(dtype=torch.float64))
    return scale, _apart(one * scale, other)


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _tolerance(dtype: torch.dtype) -> float:
    return TOLERANCE.get(dtype, max(TOLERANCE.values()))
