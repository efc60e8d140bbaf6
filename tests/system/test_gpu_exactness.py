"""Twenty training steps on a GPU give bit-identical losses over every transport and at any depth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from exact import daemon_config, learns, losses, serve, write_model
from specd.daemon.serve import embedded

pytestmark = pytest.mark.gpu(1)

TARGET, PEER = "cuda:0", "cuda:1"

Losses = list[float | None]
Train = Callable[..., Losses]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def train(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """Trains over a transport, at a depth, on a device: with a daemon in its own process or, for inproc, in this one.

    The daemon's target is on the first GPU either way.
    """
    directory = tmp_path_factory.mktemp("d")
    with (
        serve(model, directory, TARGET) as process,
        zmq.Context() as context,
        embedded(daemon_config(model, TARGET), context) as here,
    ):

        def run(transport: str, depth: int, device: str, **more: Any) -> Losses:
            inside = transport == "inproc"
            endpoints, joined = ((here.endpoint,), context) if inside else ((process,), None)
            path = tmp_path_factory.mktemp(transport)
            return losses(path, transport, depth, endpoints, joined, device, **more)

        yield run


@pytest.fixture(scope="module")
def reference(train: Train) -> Losses:
    found = train("inproc", 0, TARGET)
    assert learns(found)
    return found


def test_the_draft_trains_alike_from_run_to_run(train: Train, reference: Losses) -> None:
    """Without this, the next tests would say nothing about transports."""
    assert train("inproc", 0, TARGET) == reference


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("transport", ["inproc", "cuda_ipc", "shm", "bytes"])
def test_losses_are_the_same_on_the_targets_own_gpu(
    transport: str, depth: int, train: Train, reference: Losses
) -> None:
    assert train(transport, depth, TARGET) == reference


@pytest.mark.parametrize("depth", [0, 2])
def test_losses_are_the_same_from_slots_that_are_read_in_place(depth: int, train: Train, reference: Losses) -> None:
    assert train("cuda_ipc", depth, TARGET, borrow=True) == reference


@pytest.mark.parametrize("depth", [0, 2])
def test_losses_do_not_depend_on_held_out_rows(depth: int, train: Train, reference: Losses) -> None:
    assert train("inproc", depth, TARGET, every=7) == reference


@pytest.mark.gpu(2)
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("transport", ["inproc", "cuda_ipc", "nccl", "shm", "bytes"])
def test_losses_are_the_same_on_another_gpu(transport: str, depth: int, train: Train, reference: Losses) -> None:
    assert train(transport, depth, PEER) == reference
