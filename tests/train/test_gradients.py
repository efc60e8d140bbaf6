"""Sums of gradients over ranks: the same buckets in the same order, whatever a rank's own backward pass reaches."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch

from groups import together
from specd.train import gradients
from specd.train.distributed import Ranks
from specd.train.gradients import Gradients


class Net(torch.nn.Module):
    """Four parameters; `left` and `right` are each reached by some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.left, self.right, self.last = (
            torch.nn.Parameter(torch.full((5,), 2.0, dtype=torch.float64)) for _ in range(4)
        )

    def loss(self, x: float, *, right: bool) -> torch.Tensor:
        side = self.right if right else self.left
        total: torch.Tensor = (self.shared * side * x + self.last * self.shared).sum()
        return total


@pytest.mark.parametrize("limit", [1, 100, 1 << 20])
def test_ranks_sum_what_each_of_them_reached(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 has two batches, rank 1 one that reaches another parameter, rank 2 none at all."""
    monkeypatch.setattr(gradients, "BUCKET_BYTES", limit)
    batches: list[list[tuple[float, bool]]] = [[(1.0, False), (2.0, False)], [(3.0, True)], []]

    def work(ranks: Ranks) -> list[torch.Tensor]:
        net = Net()
        found = ranks.gradients(list(net.parameters()))
        own = batches[ranks.rank]
        for number, (x, right) in enumerate(own, 1):
            if number == len(own):
                found.last()
            net.loss(x, right=right).backward()  # type: ignore[no-untyped-call]
        ranks.finish(found.works())
        return [part.grad for part in net.parameters() if part.grad is not None]

    alone = Net()
    for x, right in chain.from_iterable(batches):
        alone.loss(x, right=right).backward()  # type: ignore[no-untyped-call]
    for sums in together(3, work):
        assert not isinstance(sums, BaseException), sums
        assert [part.tolist() for part in sums] == [part.grad.tolist() for part in alone.parameters()]  # type: ignore[union-attr]


def test_what_is_complete_is_sent_while_the_backward_pass_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 1)
    net = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(3)))
    names = {id(part): number for number, part in enumerate(net.parameters())}
    done: list[str] = []

    def reduce(tensors: list[torch.Tensor]) -> Any:
        by_grad = {id(part.grad): names[id(part)] for part in net.parameters() if part.grad is not None}
        done.append(f"sum {by_grad[id(tensors[0])]}")
        return done[-1]

    for number, layer in enumerate(net):
        layer.register_full_backward_hook(lambda *_, number=number: done.append(f"backward {number}"))
    found = Gradients(list(net.parameters()), reduce)
    net(torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert not any(line.startswith("sum") for line in done), "a batch that is not the last one of its step"
    done.clear()
    found.last()
    net(torch.ones(2, 3, requires_grad=True)).sum().backward()
    assert done.index("sum 2") < done.index("backward 1")
    sums = found.works()
    assert sums == ["sum 2", "sum 1", "sum 0"]
    assert [line for line in done if line.startswith("sum")] == sums


def test_one_rank_alone_sends_nothing() -> None:
    net = torch.nn.Linear(2, 2)
    found = Ranks().gradients(list(net.parameters()))
    found.last()
    net(torch.ones(1, 2)).sum().backward()
    assert found.works() == []
