"""Twenty training steps give bit-identical losses over every transport, depth and number of daemons."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import zmq

from exact import DRAFTS, Context, daemon_config, learns, losses, serve, write_model
from specd.daemon.serve import embedded

CASES = [
    (transport, depth, num_daemons, draft)
    for transport, depth, num_daemons, draft in product(("inproc", "shm", "bytes"), (1, 4), (1, 2), DRAFTS)
    # What others ask of the wire is what DFlash does: once over each.
    if draft in ("dflash", "eagle3") or (depth, num_daemons) == (4, 2)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def processes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """Endpoints of two daemons in processes of their own."""
    with contextlib.ExitStack() as stack:
        yield tuple(stack.enter_context(serve(model, tmp_path_factory.mktemp(name))) for name in ("a", "b"))


@pytest.fixture(scope="module")
def threads(model: Path) -> Iterator[tuple[Context, tuple[str, ...]]]:
    """Two daemons on threads of this process."""
    settings = daemon_config(model)
    with zmq.Context() as context, embedded(settings, context) as one, embedded(settings, context) as two:
        yield context, (one.endpoint, two.endpoint)


@pytest.fixture(scope="module")
def references(
    threads: tuple[Context, tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[float | None]]:
    context, endpoints = threads
    found = {
        name: losses(tmp_path_factory.mktemp(name), "inproc", 0, endpoints[:1], context, draft=name) for name in DRAFTS
    }
    assert all(learns(one) for one in found.values())
    return found


@pytest.mark.parametrize(("transport", "depth", "num_daemons", "draft"), CASES)
def test_losses_are_bit_identical(
    transport: str,
    depth: int,
    num_daemons: int,
    processes: tuple[str, ...],
    threads: tuple[Context, tuple[str, ...]],
    references: dict[str, list[float | None]],
    draft: str,
    tmp_path: Path,
) -> None:
    context, local = threads
    if transport == "inproc":
        found = losses(tmp_path, transport, depth, local[:num_daemons], context, draft=draft)
    else:
        found = losses(tmp_path, transport, depth, processes[:num_daemons], None, draft=draft)
    assert found == references[draft]
