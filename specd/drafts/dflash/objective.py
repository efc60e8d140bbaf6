"""The DFlash objective: random blocks of masked tokens, predicted from target states (arXiv 2602.06036).

Shape legend: T tokens of a batch, B sequences, M blocks, b tokens a block, R predictions that count, n taps,
H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from specd.config.settings import AttentionKind, DFlashConfig
from specd.drafts.base import Loss
from specd.drafts.block_attention import TILE, BlockLayout, block_attention, in_whole_tiles, to_device, uses_flex
from specd.drafts.blocks import make_blocks, sample_anchors
from specd.drafts.dflash.export import save_draft
from specd.drafts.dflash.model import DFlashDraft, draft_shape
from specd.drafts.head import head_loss
from specd.drafts.layers import Attend
from specd.drafts.taps import dflash_taps
from specd.errors import ConfigError
from specd.protocol.batch import Batch, Delivery
from specd.protocol.capture import DTYPE_BYTES, CaptureSpec, StateDtype
from specd.protocol.contract import TargetContract

logger = logging.getLogger(__name__)
COMPILED_TOKENS = 2048
"""Context tokens of the batch that is compiled for."""


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """How the same loss is computed. None is yes where flex_attention is used on CUDA, which needs a compiler anyway.

    compiled: the layers run through torch.compile. fused_head: see `frozen_head.head_loss`. spread_heads: see
    `block_attention.flex_attention`.
    """

    compiled: bool | None = None
    fused_head: bool | None = None
    spread_heads: bool = True


def loss_decay(config: DFlashConfig) -> float:
    """γ of the position weights; 0 is no decay. The paper takes 4, 5, 7 for blocks of 8, 10, 16; lines between."""
    if config.loss_decay >= 0:
        return config.loss_decay
    if config.loss_decay != -1:
        raise ConfigError(
            f"draft.loss_decay {config.loss_decay}: expected γ > 0, 0 for no decay, or -1 for the paper's"
        )
    size = config.block_size
    return size / 2 if size <= 10 else 7 + (size - 16) / 3


def capture_spec(config: DFlashConfig, contract: TargetContract) -> CaptureSpec:
    """What a DFlash draft needs captured: evenly spaced taps, in the target's dtype. Raises ConfigError if none fit."""
    dtype = cast(StateDtype, contract.dtype if contract.dtype in DTYPE_BYTES else "bfloat16")
    return CaptureSpec(taps=dflash_taps(contract.num_layers, config.num_taps, contract.tap_layers), dtype=dtype)


class DFlash:
    """A DFlash draft and its loss: the objective that `specd.train.loop` trains.

    target_config: the target's config.json. embedding, lm_head: the target's [V, H]; frozen, used here in `dtype`,
    one tensor if they share memory. dtype: of the draft's forward; `module` keeps float32 masters.
    seed: of the initial weights and the anchors. Raises ConfigError where draft and target do not fit.
    """

    def __init__(
        self,
        config: DFlashConfig,
        contract: TargetContract,
        target_config: dict[str, Any],
        embedding: Tensor,
        lm_head: Tensor,
        mask_token_id: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        tuning: Tuning | None = None,
    ) -> None:
        for name, tensor in (("embedding", embedding), ("lm_head", lm_head)):
            if tensor.shape != (expected := (contract.vocab_size, contract.hidden_size)):
                raise ConfigError(
                    f"{name} of {contract.model} is {list(tensor.shape)}, its contract says {list(expected)}"
                )
        self.config, self.seed, self.device = config, seed, torch.device(device)
        if config.attention == "flex" and self.device.type != "cuda":
            raise ConfigError(
                f"draft.attention=flex on {device}: torch has its gradients on GPUs only; use auto or sdpa"
            )
        shape = draft_shape(config, target_config, self.spec_for(contract).taps, mask_token_id)
        if (shape.vocab_size, shape.hidden_size) != (contract.vocab_size, contract.hidden_size):
            raise ConfigError(
                f"config.json of {contract.model} says vocabulary {shape.vocab_size} and hidden size "
                f"{shape.hidden_size}, its contract {contract.vocab_size} and {contract.hidden_size}"
            )
        self.decay = loss_decay(config)
        tiny = config.attention == "auto" and shape.head_dim < 16  # flex_attention's kernels want 16 at least
        self._attention: AttentionKind = "sdpa" if tiny else config.attention
        self.tuning = tuning or Tuning()
        self.draft = DFlashDraft(shape, seed).to(self.device)
        self._flex = self.device.type == "cuda" and uses_flex(self._attention, self.device)
        self.draft.compiled = self._flex if self.tuning.compiled is None else self.tuning.compiled
        if self._flex:
            logger.info(
                "the draft's step is compiled for %s: the first one takes up to half a minute",
                torch.cuda.get_device_name(self.device),
            )
        self.module: torch.nn.Module = self.draft
        self._compiles = self._flex or self.draft.compiled
        shared = embedding.data_ptr() == lm_head.data_ptr()
        self.embedding = embedding.detach().to(self.device, dtype)
        self.lm_head = self.embedding if shared else lm_head.detach().to(self.device, dtype)

    def spec_for(self, contract: TargetContract) -> CaptureSpec:
        """`capture_spec` of this draft's configuration."""
        return capture_spec(self.config, contract)

    def attention(self, layout: BlockLayout) -> Attend:
        """The attention of one batch's blocks, as this objective computes it."""
        return block_attention(self._attention, layout, self.device, self.tuning.spread_heads)

    def loss(self, delivery: Delivery) -> Loss:
        """The loss of one batch; its backward must run before the delivery's tensors are given up."""
        batch, taps = delivery.batch, delivery.taps
        assert taps is not None, "the capture spec of a DFlash draft always has taps"
        if self._compiles:
            self._compiles = False
            self._compile(taps.dtype)
        shape = self.draft.shape
        anchors = sample_anchors(
            batch.loss_mask, batch.lengths, batch.samples, batch.epoch, self.seed, self.config.num_anchors
        )
        blocks = make_blocks(batch, anchors, shape.block_size, shape.mask_token_id, self.decay)
        tokens, positions, context, rows, labels, offsets, weights = (
            to_device(array, self.device)
            for array in (blocks.tokens, blocks.positions, blocks.context_positions, blocks.rows, blocks.labels,
                          blocks.offsets, blocks.weights)
        )  # fmt: skip
        noise = F.embedding(tokens, self.embedding)
        states = self.module(taps.flatten(1), context, noise, positions, self.attention(blocks.layout))
        fused = self._flex if self.tuning.fused_head is None else self.tuning.fused_head
        total, correct = head_loss(
            states.index_select(0, rows), self.lm_head, labels, weights, self.config.loss_chunk, fused
        )
        by_offset = torch.zeros(2, shape.block_size - 1, device=self.device)
        by_offset.index_add_(1, offsets - 1, torch.stack((correct.float(), torch.ones_like(weights))))
        return Loss(total, weights.sum(), {"correct": by_offset[0], "counted": by_offset[1]})

    def _compile(self, dtype: torch.dtype) -> None:
        """Train on a batch of made-up tokens and forget it, because kernels are shaped by the sizes they meet first.

        A resumed run begins with another batch than the run it goes on with, and has to round alike. dtype: of taps.
        """
        shape, size = self.draft.shape, COMPILED_TOKENS
        if in_whole_tiles(size) == in_whole_tiles(self.config.num_anchors * shape.block_size):
            size += TILE  # sizes that are equal at first are taken to be equal always
        batch = Batch(
            tokens=np.zeros(size, np.int32),
            lengths=np.full(1, size, np.int32),
            loss_mask=np.ones(size, np.bool_),
            samples=(0,),
        )
        taps = torch.zeros(size, len(shape.taps), shape.hidden_size, dtype=dtype, device=self.device)
        with torch.enable_grad():
            self.loss(Delivery(batch, taps)).sum.backward()  # type: ignore[no-untyped-call]
        self.module.zero_grad()

    def export(self, path: Path, files: Mapping[str, bytes] | None = None) -> None:
        """Write the draft in its published format, in the dtype it computes in; `files`: tokenizer files beside it."""
        save_draft(self.draft, path, dtype=self.embedding.dtype, files=files or {})
