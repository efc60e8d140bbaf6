"""The objective of block drafts: random blocks of masked tokens, predicted from target states (arXiv 2602.06036).

Shape legend: T tokens of a batch, B sequences, M blocks, b tokens a block, R predictions that count, n taps,
H hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from specd.config.settings import AttentionKind
from specd.drafts.backbone.export import save_network, serving_notes
from specd.drafts.backbone.form import Form
from specd.drafts.backbone.settings import BlockConfig
from specd.drafts.backbone.shape import BlockShape
from specd.drafts.backbone.start import started
from specd.drafts.backbone.weighting import loss_decay
from specd.drafts.base import Loss, TargetParts, Tuning
from specd.drafts.block_attention import BlockLayout, block_attention
from specd.drafts.blocks import Blocks, make_blocks, sample_anchors
from specd.drafts.card import card
from specd.drafts.compile import compiling_for
from specd.drafts.device import to_device
from specd.drafts.flex import TILE, in_whole_tiles, trains_by_flex
from specd.drafts.head import Scores, row_head
from specd.drafts.initial import FACT, provenance
from specd.drafts.layers import Attend
from specd.protocol.batch import Batch, Delivery

logger = logging.getLogger(__name__)
COMPILED_CONTEXT, COMPILED_ROWS = 15, 60
"""Tiles of the batch that is compiled for: of its context, and at most of its blocks' rows; or a few more."""


class BlockObjective(ABC):
    """A block draft and its loss: the objective that `specd.train.loop` trains. What becomes of its states is its own.

    target: its embedding and lm_head are used here in `dtype`, frozen. dtype: of the draft's forward; `module` keeps
    float32 masters. seed: of the initial weights and the anchors. Raises ConfigError where draft and target do not fit.
    """

    form: ClassVar[Form]

    def __init__(
        self,
        config: BlockConfig,
        target: TargetParts,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        tuning: Tuning | None = None,
    ) -> None:
        self.config, self.seed, self.device = config, seed, torch.device(device)
        self.draft = started(config, target, seed, self.form).to(self.device)
        self._target = target.contract.model
        self._provenance = provenance(config.init) if config.init else ""
        self.decay = loss_decay(config)
        self.tuning = tuning or Tuning()
        self._flex = trains_by_flex(config.attention, self.draft.shape.head_dim, self.device)
        self._attention: AttentionKind = "flex" if self._flex else "sdpa"
        self.draft.compiled = self._flex if self.tuning.compiled is None else self.tuning.compiled
        self.module: torch.nn.Module = self.draft
        self._cold = self._flex or self.draft.compiled
        self.embedding, self.lm_head = target.frozen(self.device, dtype)

    @abstractmethod
    def score(self, delivery: Delivery, blocks: Blocks, states: Tensor) -> Loss:
        """The loss of a batch, from the states of all tokens of its blocks [N, H]."""

    @abstractmethod
    def config_json(self) -> dict[str, Any]:
        """What the draft is published with, in the dtype it computes in."""

    @abstractmethod
    def serving(self) -> dict[str, str]:
        """Engine -> the command that serves the draft."""

    def attention(self, layout: BlockLayout) -> Attend:
        """The attention of one batch's blocks, as this objective computes it."""
        return block_attention(self._attention, layout, self.device, self.tuning.spread_heads)

    def draw(self, batch: Batch) -> Blocks:
        """The blocks of a batch: drawn by seed, epoch and sample alone."""
        anchors = sample_anchors(
            batch.loss_mask, batch.lengths, batch.samples, batch.epoch, self.seed, self.config.num_anchors
        )
        shape = self.draft.shape
        return make_blocks(
            batch,
            anchors,
            shape.block_size,
            shape.mask_token_id,
            self.decay,
            first=shape.first,
            unbroken=self.form.unbroken,
        )

    def loss(self, delivery: Delivery) -> Loss:
        """The loss of one batch; its backward must run before the delivery's tensors are given up."""
        batch, taps = delivery.batch, delivery.taps
        assert taps is not None, "the capture spec of a block draft always has taps"
        self.warm_up(taps.dtype)
        blocks = self.draw(batch)
        tokens, positions, context = (
            to_device(array, self.device) for array in (blocks.tokens, blocks.positions, blocks.context_positions)
        )
        noise = self.draft.scaled(F.embedding(tokens, self.embedding))
        features = taps.flatten(1).detach()  # or compilers would tell slots and staging buffers from other memory
        states = self.module(features, context, noise, positions, self.attention(blocks.layout))
        return self.score(delivery, blocks, states)

    def read(self, states: Tensor, labels: Tensor, top_k: int = 0) -> Scores:
        """What the target's head says of rows of states [R, H], through the target's own logit transform."""
        return row_head(
            self.multiplied(states),
            self.lm_head,
            labels,
            self.config.loss_chunk,
            top_k=top_k,
            fused=self.fused,
            softcap=self.draft.shape.final_logit_softcapping,
        )

    def multiplied(self, states: Tensor) -> Tensor:
        """What the head reads, so that its products are the target's logits before any soft-cap."""
        factor = self.draft.shape.output_multiplier
        return states if factor == 1.0 else states * factor

    @property
    def fused(self) -> bool:
        """Whether losses come from kernels; see Tuning."""
        return self._flex if self.tuning.fused_head is None else self.tuning.fused_head

    def by_offset(self, blocks: Blocks, rows: Tensor, **sums: Tensor) -> dict[str, Tensor]:
        """Metrics float32 [guesses]: each of `sums` [R] by offset, and how many were `counted`. rows: of `blocks`."""
        one = torch.ones(len(rows), dtype=torch.float32, device=self.device)
        columns = torch.stack([*(part.float() for part in sums.values()), one])
        # Through zeros, as atomic additions would round in another order from run to run.
        dense = columns.new_zeros(len(columns), len(blocks.tokens)).index_copy(1, rows, columns)
        found = dense.view(len(columns), -1, blocks.layout.block_size).sum(1)[:, self.draft.shape.first :]
        return dict(zip((*sums, "counted"), found, strict=True))

    def warm_up(self, dtype: torch.dtype) -> None:
        """Train on a batch of made-up tokens and forget it, because kernels are shaped by the sizes they meet first.

        A resumed run begins with another batch than the run it goes on with, and has to round alike. dtype: of taps.
        """
        if not self._cold:
            return
        self._cold = False
        logger.info("compiling the draft's step for %s: up to a minute, seconds from the next run on", self.device)
        began = time.perf_counter()
        shape, (batch, sizes) = self.draft.shape, made_up(self.draft.shape, self.config.num_anchors)
        taps = torch.zeros(batch.num_tokens, len(shape.taps), shape.hidden_size, dtype=dtype, device=self.device)
        with torch.enable_grad(), compiling_for(*sizes):
            self.loss(Delivery(batch, taps, taps[:, 0] if self.form.final else None)).sum.backward()  # type: ignore[no-untyped-call]
        self.module.zero_grad()
        logger.info("compiled in %.0f s", time.perf_counter() - began)

    def facts(self) -> dict[str, str]:
        """See Objective.facts."""
        shape = self.draft.shape
        return {
            "layers": str(shape.num_layers),
            "trained parameters": f"{sum(parameter.numel() for parameter in self.module.parameters()):,}",
            "taps": ", ".join(map(str, shape.taps)),
            "block size": str(shape.block_size),
            "computes in": str(self.embedding.dtype).removeprefix("torch."),
        } | ({FACT: self._provenance} if self._provenance else {})

    def export(self, path: Path, files: Mapping[str, bytes] | None = None) -> None:
        """See Objective.export; its weights are written in the dtype it computes in."""
        shape, embedding = self.draft.shape, None
        if shape.input_embedding_scale != 1.0:
            embedding = self.draft.scaled(self.embedding)
        readme = card(self.form.title, self._target, self.facts(), self.serving(), serving_notes(shape))
        save_network(
            self.draft,
            self.config_json(),
            path,
            dtype=self.embedding.dtype,
            files={**(files or {}), "README.md": readme},
            embedding=embedding,
        )


def made_up(shape: BlockShape, num_anchors: int) -> tuple[Batch, tuple[int, int]]:
    """A batch that can be compiled for, and its N and T: whole tiles, and neither they nor their tiles a known size.

    Sizes that are equal when a function is compiled are taken to be equal always: N that is the hidden size by chance,
    or as many tiles as heads share keys, would be compiled for again at the first batch where it is not.
    """
    size, known = shape.block_size, {TILE, *shape.sizes()}
    step = TILE // math.gcd(TILE, size)  # so many blocks are whole tiles
    least = max(2 * TILE, min(num_anchors * size, COMPILED_ROWS * TILE))
    for more_rows, more_context in itertools.product(range(64), repeat=2):
        blocks = step * (-(-least // (step * size)) + more_rows)
        full, rest = divmod(blocks, num_anchors)
        anchors = [num_anchors] * full + [rest] * bool(rest)
        rows = blocks * size
        context = in_whole_tiles(max(COMPILED_CONTEXT * TILE, blocks + len(anchors) + 1)) + more_context * TILE
        sizes = {part // unit for part in (rows, context, rows + context) for unit in (1, TILE)}
        if len(sizes - known) == 6:
            return _labelled(anchors, context), (rows, context)
    raise AssertionError("64² sizes and fewer than 30 that are known")


def _labelled(anchors: list[int], num_tokens: int) -> Batch:
    """A batch of `num_tokens`: a sequence for each count of anchors, and one without labels that fills it up."""
    lengths = [count + 1 for count in anchors]
    lengths.append(num_tokens - sum(lengths))
    return Batch(
        tokens=np.zeros(num_tokens, np.int32),
        lengths=np.array(lengths, np.int32),
        loss_mask=np.arange(num_tokens) < num_tokens - lengths[-1],
        samples=tuple(range(len(lengths))),
    )
