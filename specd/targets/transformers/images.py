"""Images: what a sequence brings beside its tokens, and the model around the decoder that puts it in their place."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from specd.errors import TargetError
from specd.protocol.payload import Payload
from specd.targets.base import patch_counts, payload_tensor

_KINDS = ("pixel_", "image_", "video_", "token_type_ids", "mm_token_type_ids", "second_per_grid_ts")
"""How the names of arguments begin that a processor of images or videos makes."""


class Encoders:
    """The model of transformers that a decoder is a part of, beside its encoders of images.

    names: of the arrays that it takes, none where the decoder is all there is.
    """

    __slots__ = ("_whole", "names")

    def __init__(self, network: PreTrainedModel, decoder: torch.nn.Module) -> None:
        inner = network.base_model
        self._whole: Any = getattr(network, "model", network) if inner is network else inner
        taken = inspect.signature(self._whole.forward).parameters
        separate = self._whole is not decoder and "pixel_values" in taken
        self.names = tuple(sorted(name for name in taken if name.startswith(_KINDS))) if separate else ()

    def run(self, tokens: torch.Tensor, brought: Payload) -> Any:
        """One forward of tokens [1, T] and what they bring, as a user of transformers would call it.

        Raises TargetError for arrays that do not belong together.
        """
        arguments = {name: payload_tensor(array).to(tokens.device) for name, array in brought.items()}
        for name, values in arguments.items():
            if name.endswith("token_type_ids") and values.shape != tokens.shape:
                raise TargetError(f"{name} of a sequence is {list(values.shape)}, expected {list(tokens.shape)}")
            if name.startswith("pixel_values"):
                arguments[name] = values.to(self._whole.dtype)
        check_grids(arguments)
        try:
            return self._whole(input_ids=tokens, use_cache=False, **arguments)
        except (ValueError, TypeError, AttributeError, LookupError, StopIteration, NotImplementedError) as error:
            raise TargetError(
                f"what a sequence of {tokens.shape[1]} tokens brings ({', '.join(sorted(arguments))}) does not fit "
                f"them, or the model: {error}; prepare the data with the target's own processor"
            ) from error

    def close(self) -> None:
        """Let go of the model."""
        self._whole = None


def check_grids(arguments: dict[str, torch.Tensor]) -> None:
    """Raise TargetError unless there are as many patches as the grids say, before a GPU finds out."""
    for grids, pixels in (("image_grid_thw", "pixel_values"), ("video_grid_thw", "pixel_values_videos")):
        if grids not in arguments:
            continue
        if pixels not in arguments:
            raise TargetError(f"a sequence brings {grids} without {pixels}: give both, as the processor made them")
        grid, patches = arguments[grids], arguments[pixels]
        if not patches.ndim or not patch_counts(grid, patches.shape[0]):
            raise TargetError(
                f"{pixels} of a sequence is {list(patches.shape)}, and {grids} {grid.flatten()[:24].tolist()} "
                f"asks for other patches; prepare the data with the target's own processor"
            )
