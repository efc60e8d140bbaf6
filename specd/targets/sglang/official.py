"""SGLang's own capture of layer outputs, as it feeds them to a draft that it serves.

The check of our hooks at the start, and the source of states where a layer does not add to the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from specd.errors import TargetError

SETTERS: Final = ("set_dflash_layers_to_capture", "set_eagle3_layers_to_capture")
"""In order: EAGLE-3's counts layers in another way for some models, all of which have the first one."""


class Official:
    """The capture of one model; off until `use`. Flags of it are left as they were found by `off`."""

    __slots__ = ("_found", "_layers", "_model", "setter")

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._found: list[tuple[torch.nn.Module, dict[str, Any]]] = []
        self._layers: tuple[int, ...] = ()
        self.setter = next((name for name in SETTERS if hasattr(model, name)), "")

    @property
    def exact(self) -> bool:
        """Whether its setter takes layers whose outputs are meant, whatever the model."""
        return self.setter == SETTERS[0]

    def use(self, layers: Sequence[int]) -> None:
        """Capture the outputs of `layers`, ascending, from the next forward on. Every rank calls it."""
        if self._layers == tuple(layers):
            return
        self.off()  # of several models a second set adds to the first
        self._found = [(module, _flags(module)) for module in self._model.modules()]
        self._layers = tuple(layers)
        getattr(self._model, self.setter)(list(layers))

    def off(self) -> None:
        """Capture nothing from the next forward on. Idempotent."""
        for module, before in self._found:
            for name in _flags(module).keys() - before.keys():
                delattr(module, name)
            for name, value in before.items():
                setattr(module, name, value)
        self._found, self._layers = [], ()

    def states(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The captured states, [T, H] each, from what logits_processor was called with. Raises TargetError."""
        given = args[4] if len(args) > 4 else kwargs.get("aux_hidden_states")
        final: torch.Tensor = args[1] if len(args) > 1 else kwargs["hidden_states"]
        num_tokens, hidden = final.shape
        if isinstance(given, torch.Tensor) and given.shape == (num_tokens, hidden * len(self._layers)):
            return list(torch.split(given, hidden, dim=1))  # packed, as DeepSeek's
        found = [] if given is None or isinstance(given, torch.Tensor) else list(given)
        shapes = {tuple(states.shape) for states in found}
        if len(found) != len(self._layers) or shapes != {(num_tokens, hidden)}:
            seen = f"{len(found)} of shape {', '.join(map(str, sorted(shapes)))}" if found else "none"
            raise TargetError(
                f"SGLang's {type(self._model).__name__} was asked for the states of {len(self._layers)} layers and "
                f"gave {seen}, expected {(num_tokens, hidden)} each; use --backend transformers"
            )
        return found


def _flags(module: torch.nn.Module) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, list) else value
        for name, value in vars(module).items()
        if name == "capture_aux_hidden_states" or name.endswith("_to_capture")
    }
