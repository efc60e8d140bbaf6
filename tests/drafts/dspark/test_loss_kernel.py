"""The kernel of DSpark's loss against the same in torch's own operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from specd.drafts.dspark.loss import Teacher, distances

pytestmark = pytest.mark.gpu(1)
RANK = 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [97, 32000])
def test_the_kernel_is_the_plain_path_and_the_same_each_time(vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, size = 300, 64
    sources = np.random.default_rng(0).integers(0, 90, rows)
    head, states, second, gained = (
        torch.randn(shape, generator=generator).to("cuda", dtype)
        for shape in ((vocab, size), (90, size), (vocab, RANK), (rows, RANK))
    )
    # Some rows guess what their teacher means.
    hidden = torch.randn(rows, size, generator=generator).to("cuda", dtype) + 2 * states[sources]
    labels = (hidden @ head.T).argmax(-1).where(torch.arange(rows, device="cuda") % 3 == 0, 5)
    weights = torch.rand(rows, generator=generator).cuda()

    def results(*, fused: bool) -> list[Tensor]:
        inputs = hidden.clone().requires_grad_(), gained.clone().requires_grad_(), second.float().requires_grad_()
        teacher = Teacher(head, states, 0.0, 0.1, 0.9, 128, fused)
        found = distances(*inputs, teacher, sources, labels, weights)
        return [*found, *torch.autograd.grad(found.total, inputs)]

    ours, again, plain = results(fused=True), results(fused=True), results(fused=False)
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))
    for one, other in zip(ours[:3], plain[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours[3], plain[3])
    assert 0 < ours[3].sum() < rows
    for one, other in zip(ours[4:], plain[4:], strict=True):
        assert (one.float() - other.float()).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-4) * other.float().norm()


def test_a_bad_state_gives_a_bad_loss() -> None:
    head, states, second = (torch.randn(size, device="cuda") for size in ((97, 8), (3, 8), (97, RANK)))
    hidden, gained = torch.randn(2, 8, device="cuda"), torch.randn(2, RANK, device="cuda")
    hidden[1, 3] = torch.nan
    labels, weights = torch.tensor([3, 4], device="cuda"), torch.ones(2, device="cuda")
    teacher = Teacher(head, states, 0.0, 0.1, 0.9, 128, True)
    assert distances(hidden, gained, second, teacher, np.array([0, 2]), labels, weights).total.isnan()
