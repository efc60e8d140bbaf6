"""The DFlash2 network: the backbone with a convolution around every sublayer, and the selector of candidates.

Shape legend: N block tokens, b tokens a block, H hidden size, G groups of g adjacent channels, V vocabulary, R rows,
K candidates, r rank. Module names are those of published checkpoints, so state dicts travel both ways.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specd.drafts.backbone.network import Backbone, Layer
from specd.drafts.backbone.shape import BlockShape
from specd.drafts.layers import KeyValue, Linear, Rope, beside, draw, lookup


class DFlash2Shape(BlockShape, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Of a DFlash2 draft; see `DFlash2Config`. Its config.json always says whether it is causal."""

    names_causal: ClassVar[bool] = True
    conv_kernel_size: int
    conv_group_size: int
    selector_rank: int
    selector_top_k: int

    def sizes(self) -> set[int]:
        """See BlockShape.sizes."""
        taps, group = self.conv_kernel_size, self.conv_group_size
        groups = self.hidden_size // group
        return super().sizes() | {taps, group, groups, 2 * taps * groups, taps * groups}

    def problem(self) -> str | None:
        """Why no draft of this shape can exist, or None if it can."""
        taps, group = self.conv_kernel_size, self.conv_group_size
        if min(taps, group, self.selector_rank, self.selector_top_k) < 1:
            return (
                f"conv_kernel_size {taps}, conv_group_size {group}, selector_rank {self.selector_rank} and "
                f"selector_top_k {self.selector_top_k}: expected positive numbers"
            )
        if self.hidden_size % group:
            return f"conv_group_size {group} does not divide the hidden size {self.hidden_size}"
        if taps > self.block_size:
            return f"conv_kernel_size {taps} is longer than a block of {self.block_size} tokens"
        if self.selector_top_k > self.vocab_size:
            return f"selector_top_k {self.selector_top_k} is more than the vocabulary of {self.vocab_size}"
        return super().problem()


class Mix(torch.autograd.Function):
    """Σ_t (base[t, c] + asked[i, t, c div g]) · x[i − t, c] of each block, where x is 0 before it.

    Its backward is written out because compilers keep shifted rows for it: they do not compute a padding twice. Here it
    moves the gradient instead, and reads nothing but x. Kernels' gradients are summed block by block first, so that
    there is enough to do at a time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor, asked: Tensor, block_size: int) -> Tensor:
        """x [N, H], base float32 [taps, H], asked [N, taps, G] -> [N, H]."""
        ctx.save_for_backward(x, base, asked)
        ctx.block_size = block_size
        rows, kernels = _by_block(x, base, asked, block_size)
        out = kernels[0] * rows
        for tap in range(1, len(kernels)):
            out = out + kernels[tap] * F.pad(rows[:, :-tap], (0, 0, 0, 0, tap, 0))
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        x, base, asked = ctx.saved_tensors
        rows, kernels = _by_block(x, base, asked, ctx.block_size)
        grad, by_x = _blocks(grad_outputs[0], ctx.block_size).view(rows.shape), torch.zeros_like(rows)
        by_base, by_asked = [], []
        for tap, kernel in enumerate(kernels):
            # Of the row `tap` behind each: what it did with this one.
            by_x = by_x + _earlier(kernel * grad, tap)
            products = rows * _earlier(grad, tap)
            by_base.append(products.sum(1, dtype=torch.float32).sum(0).view(-1))
            by_asked.append(F.pad(products.sum(-1), (0, 0, tap, -tap)).flatten(0, 1))
        return by_x.view(x.shape), torch.stack(by_base), torch.stack(by_asked, 1), None


def _by_block(x: Tensor, base: Tensor, asked: Tensor, block_size: int) -> tuple[Tensor, list[Tensor]]:
    """x as [blocks, b, G, g], and for each tap the kernels of its rows, of the same shape."""
    taps, groups = asked.shape[1:]
    rows, by_row = torch.unflatten(_blocks(x, block_size), 2, (groups, -1)), _blocks(asked, block_size)
    own = base.to(x.dtype).view(taps, groups, -1)
    return rows, [own[tap] + by_row[:, :, tap, :, None] for tap in range(taps)]


def _blocks(x: Tensor, size: int) -> Tensor:
    """Rows [N, …] as [blocks, size, …].

    `view` would do, but compilers take its second dimension for N // blocks, which they do not know to be `size`.
    """
    return x.unfold(0, size, size).movedim(-1, 1)


def _earlier(rows: Tensor, tap: int) -> Tensor:
    """Rows [blocks, b, G, g] moved `tap` places towards the beginning of their blocks, zeros behind them."""
    return F.pad(rows[:, tap:], (0, 0, 0, 0, 0, tap)) if tap else rows


class Convolution(nn.Module):
    """A convolution over the tokens of a block on the way into a sublayer, and one on the way out.

    A channel has kernels of its own, to which those of its group are added that the sublayer's input asks for. It
    begins as the identity.
    """

    def __init__(self, shape: DFlash2Shape) -> None:
        super().__init__()
        size, self.taps, self.group = shape.hidden_size, shape.conv_kernel_size, shape.conv_group_size
        self.block_size = shape.block_size
        self.base_kernel = nn.Parameter(torch.zeros(2, self.taps, size, dtype=torch.float32))
        self.kernel_projection = Linear(size, 2 * self.taps * (size // self.group))
        with torch.no_grad():
            self.base_kernel[:, 0] = 1.0
            self.kernel_projection.weight.zero_()

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A sublayer's input [N, H] -> what it reads instead, and the kernels [N, taps, G] of the way out."""
        asked = self.kernel_projection(x).view(x.shape[0], 2, self.taps, x.shape[1] // self.group)
        return self._convolve(x, asked[:, 0], 0), asked[:, 1]

    def leave(self, x: Tensor, asked: Tensor) -> Tensor:
        """A sublayer's output [N, H] -> what is added to the residual stream. asked: as `enter` gave it."""
        return self._convolve(x, asked, 1)

    def _convolve(self, x: Tensor, asked: Tensor, side: int) -> Tensor:
        mixed: Tensor = Mix.apply(x, self.base_kernel[side], asked, self.block_size)  # type: ignore[no-untyped-call]
        return mixed


class ConvolvedLayer(Layer):
    """A layer of the backbone with a convolution around its attention and one around its MLP."""

    attention_conv: Convolution
    mlp_conv: Convolution

    def enter(self, x: Tensor, rope: Rope) -> tuple[Tensor, KeyValue, Tensor]:
        """See Layer.enter; and the kernels of the way out. The context is not convolved."""
        x, out = self.attention_conv.enter(self.input_layernorm(x))
        return self.self_attn.queries(x, rope), self.self_attn.keys_values(x, rope), out

    def leave(self, x: Tensor, attended: Tensor, *kept: Any) -> Tensor:
        """See Layer.leave."""
        x = x + self.attention_conv.leave(self.self_attn.o_proj(attended), *kept)
        y, out = self.mlp_conv.enter(self.post_attention_layernorm(x))
        return x + self.mlp_conv.leave(self.mlp(y), out)


class Selector(nn.Module):
    """What a candidate gains from the token before it: ⟨A[before] ⊙ P h, B[candidate]⟩. At first nothing."""

    def __init__(self, shape: DFlash2Shape, seed: int) -> None:
        super().__init__()
        size = shape.vocab_size, shape.selector_rank
        self.predecessor_codebook = nn.Parameter(torch.empty(size, dtype=torch.float32))
        self.successor_codebook = nn.Parameter(torch.empty(size, dtype=torch.float32))
        self.hidden_projection = Linear(shape.hidden_size, shape.selector_rank)
        draw(self, seed)
        with torch.no_grad():
            self.successor_codebook.zero_()

    def forward(self, states: Tensor, before: Tensor, candidates: Tensor) -> Tensor:
        """States [R, H], tokens before them int64 [R], candidates int64 [R, K] -> what these gain, float32 [R, K]."""
        # Looked up and then rounded: the codebooks are as long as the vocabulary.
        asked = lookup(self.predecessor_codebook, before).to(states.dtype) * self.hidden_projection(states)
        offered = lookup(self.successor_codebook, candidates).to(states.dtype)
        return torch.bmm(offered, asked[:, :, None])[:, :, 0].float()


class DFlash2Draft(Backbone):
    """The trainable draft. It begins as the DFlash draft of its seed: convolutions that change nothing, a selector of
    no opinion.
    """

    layer: ClassVar[type[Layer]] = ConvolvedLayer

    def __init__(self, shape: BlockShape, seed: int = 0) -> None:
        super().__init__(shape, seed)
        assert isinstance(shape, DFlash2Shape)
        for layer in self.layers:
            assert isinstance(layer, ConvolvedLayer)
            layer.attention_conv, layer.mlp_conv = Convolution(shape), Convolution(shape)
        self.candidate_selector = Selector(shape, beside(seed))
