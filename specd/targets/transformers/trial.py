"""What a plain forward of transformers says about a model at the start, before any sequence is served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from specd.errors import TargetError

FIRST, SECOND = (1, 2, 3, 1, 2), (2, 1, 3)
"""Token ids of the two sequences of a trial, modulo the vocabulary."""
OTHER = (3, 3, 2, 1, 3)
"""Another first sequence: what follows it must not change."""


class States(msgspec.Struct, frozen=True):
    """taps [T, L - 1, H] and final [T, H], as float32."""

    taps: torch.Tensor
    final: torch.Tensor


def plain(network: Any, tokens: Sequence[int], num_layers: int, name: str) -> States:
    """The states of one sequence, as the whole model reports them (`output_hidden_states`).

    Raises TargetError where it reports none of a layer, or where a state depends on later tokens.
    """
    whole, begin = (_hidden(network, part, num_layers, name) for part in (tokens, tokens[:-1]))
    if not near(begin[-1], whole[-1][:-1], exact=network.dtype == torch.float32):
        raise TargetError(
            f"target {name}: its {type(network).__name__} lets a token see later ones, expected a causal LM (is "
            f"`is_decoder` of its config.json false?); take another target"
        )
    taps = whole[:-1]
    return States(torch.stack(taps, dim=1) if taps else whole[-1].new_empty(len(tokens), 0, 0), whole[-1])


def check_taps(found: States, expected: States, *, exact: bool, name: str) -> None:
    """Raise TargetError where captured states are not those of a plain forward; it names the layer."""
    for tap in range(expected.taps.shape[1]):
        if not near(found.taps[:, tap], expected.taps[:, tap], exact=exact):
            raise TargetError(
                f"target {name}: what its layer {tap} puts out is not the state that transformers reports after it "
                f"(hidden_states[{tap + 1}]); it cannot be tapped: take another target, or try --backend sglang"
            )
    if not near(found.final, expected.final, exact=exact):
        raise TargetError(
            f"target {name}: the last state of its decoder is not the one that transformers reports "
            f"(hidden_states[-1]); take another target, or try --backend sglang"
        )


def near(found: torch.Tensor, expected: torch.Tensor, *, exact: bool) -> bool:
    """Whether two states agree: element by element in float32, else on the whole.

    In half precision a mixture of experts may send a token to other experts after another order of summation.
    """
    if found.shape != expected.shape:
        return False
    found, expected = found.float().nan_to_num(), expected.float().nan_to_num()
    if exact:
        return float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    return float((found - expected).norm()) <= 0.5 * float(expected.norm())


def _hidden(network: Any, tokens: Sequence[int], num_layers: int, name: str) -> list[torch.Tensor]:
    ids = torch.tensor([tokens], device=network.device)
    with torch.inference_mode():
        output = network(input_ids=ids, use_cache=False, output_hidden_states=True)
    states = getattr(output, "hidden_states", None) or ()
    shapes = {tuple(state.shape) for state in states}
    if len(states) != num_layers + 1 or any(len(shape) != 3 or shape[:2] != (1, len(tokens)) for shape in shapes):
        raise TargetError(
            f"target {name}: {type(network).__name__} reports {len(states)} hidden states of shapes "
            f"{', '.join(map(str, sorted(shapes))) or 'none'}, expected {num_layers + 1} of [1, T, H]: they are no one "
            f"stream with a state after each layer, and cannot be tapped; take another target"
        )
    return [state[0].float() for state in states[1:]]
