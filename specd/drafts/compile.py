"""torch.compile for drafts: kernels that do not depend on timing, and errors a person can act on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch

from specd.errors import ConfigError

Function = TypeVar("Function", bound=Callable[..., Any])


@functools.cache
def compiled(function: Function, instead: str) -> Function:
    """torch.compile of a function, once for all numbers of tokens and all layers of a shape.

    Kernels are chosen without timing them: another choice could round differently from one run to the next.
    What it returns raises ConfigError where the function cannot be compiled on this machine. instead: says there what
    works without.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor import config

    # Sums over as few numbers as heads share keys go into the element-wise kernel around them: as reductions of their
    # own, with no shape tried out, they take many times what their bytes need.
    options: dict[str, Any] = {"unroll_reductions_threshold": 17}
    if hasattr(config, "deterministic"):  # from torch 2.10 on
        options["deterministic"] = True
    # It is tried or left by the number of tokens: every range of sizes would be compiled for when it first comes.
    if hasattr(config.triton, "mix_order_reduction"):  # from torch 2.10 on
        options["triton.mix_order_reduction"] = False
    inner = torch.compile(function, dynamic=True, options=options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return inner(*args, **kwargs)
        except TorchDynamoException as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ConfigError(
                f"torch.compile cannot build the draft's kernels here ({reason}): it needs Triton and a C "
                f"compiler; {instead}"
            ) from error

    return cast(Function, call)


@contextlib.contextmanager
def compiling_for(*sizes: int, graphs: int = 1) -> Iterator[None]:
    """Where what is `compiled` meets its first arguments, of these sizes. graphs: a function needs at most, or so.

    Kernels are shaped by those sizes, but torch's caches on disk do not tell sizes apart: what a run with others left
    there could round differently, so it is kept apart.
    """
    import torch._dynamo.config
    import torch.compiler.config

    tag = "-".join(["specd", *map(str, sizes)])
    dynamo: Any = torch._dynamo.config
    compiler: Any = torch.compiler.config
    # Numbers such as the norms' epsilon are constants: else each function is traced twice, to find out.
    limit = max(dynamo.recompile_limit, graphs + 2)
    with (
        dynamo.patch(specialize_float=True, recompile_limit=limit),
        compiler.patch(cache_key_tag=f"{compiler.cache_key_tag}{tag}"),
    ):
        yield
