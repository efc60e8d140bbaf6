"""The kernel of a taught loss against the same in torch's own operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from specd.drafts.logits import LogitTransform
from specd.drafts.taught import Teacher, taught_loss

pytestmark = pytest.mark.gpu(1)
U, H = 150, 64


def results(vocab: int, dtype: torch.dtype, fused: bool, spoil: bool = False) -> list[Tensor]:
    """Sum, counts and hits; the gradients of hidden states and head."""
    generator = torch.Generator().manual_seed(0)
    size = 2 * vocab
    head, states = (torch.randn(n, H, generator=generator).to("cuda", dtype) for n in (size, U))
    own = torch.arange(0, size, 2, device="cuda")
    taught = (np.arange(1, U), np.arange(2, U, 3), np.array([], np.int64))
    teachers = np.concatenate(taught)
    # Some rows guess what their teacher means.
    hidden = torch.randn(teachers.size, H, generator=generator).to("cuda", dtype) + 2 * states[teachers]
    master = head[own].float().requires_grad_()
    if spoil:
        hidden[3, 5] = torch.nan
    teacher = Teacher(head, own, LogitTransform(0.25, 1.5), states, chunk=64)
    found = taught_loss(hidden.requires_grad_(), master, teacher, taught, (1.0, 0.5, 0.25), fused)
    (2 * found[0]).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert master.grad is not None
    return [*found, hidden.grad.float(), master.grad]


@pytest.mark.parametrize("vocab", [97, 32000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_plain_path_and_itself(vocab: int, dtype: torch.dtype) -> None:
    ours, again, plain = (results(vocab, dtype, fused) for fused in (True, True, False))
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-5, atol=1e-3)
    assert torch.equal(ours[1], plain[1])
    assert torch.equal(ours[2], plain[2])
    assert 0 < ours[2].sum() < ours[1].sum()
    for one, other in zip(ours[3:], plain[3:], strict=True):
        assert (one - other).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-5) * other.norm()


def test_a_bad_state_gives_a_bad_loss() -> None:
    assert results(97, torch.float32, True, spoil=True)[0].isnan()
