"""The EAGLE-3 objective: several steps of the draft on its own states, taught by the target's distribution.

Steps are those of training-time test (arXiv 2503.01840): tokens come from the text, states from the draft itself.
Shape legend: T tokens of a batch, R rows of a step, U teacher rows, n taps, H hidden size, V vocabulary, W draft
vocabulary.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from specd.drafts.base import Loss, TargetParts, Tuning
from specd.drafts.compile import compiling_for
from specd.drafts.device import to_device
from specd.drafts.eagle3.attention import attention
from specd.drafts.eagle3.export import model_card, save_draft
from specd.drafts.eagle3.model import Eagle3Shape
from specd.drafts.eagle3.rows import Rows, in_tiles, rows_of
from specd.drafts.eagle3.settings import Eagle3Config
from specd.drafts.eagle3.start import started
from specd.drafts.flex import TILE, trains_by_flex
from specd.drafts.initial import FACT, provenance
from specd.drafts.layers import KeyValue, sharing
from specd.drafts.taught import Teacher, taught_loss
from specd.drafts.vocabulary import covered
from specd.protocol.batch import Batch, Delivery

logger = logging.getLogger(__name__)
COMPILED_CONTEXT, COMPILED_ROWS = 24, 17
"""Tiles of the batch that is compiled for: of its tokens, and of its rows; or a few more."""


class Eagle3:
    """An EAGLE-3 draft and its loss: the objective that `specd.train.loop` trains.

    target: its embedding and lm_head are used here in `dtype`, frozen; its label counts choose the draft vocabulary.
    dtype: of the draft's forward; `module` keeps float32 masters. seed: of the initial weights; nothing else is drawn.
    Raises ConfigError where draft and target do not fit.
    """

    def __init__(
        self,
        config: Eagle3Config,
        target: TargetParts,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        tuning: Tuning | None = None,
    ) -> None:
        contract = target.contract
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        self.draft = started(config, target, seed).to(self.device)
        self._target = contract.model
        self.transform = target.logit_transform()
        own, counts = self.draft.vocabulary.cpu().numpy(), target.label_counts
        self._covered = 1.0 if counts is None else covered(counts, own)
        self.module: torch.nn.Module = self.draft
        self.embedding, self.lm_head = target.frozen(self.device, dtype)
        self._flex = trains_by_flex(config.attention, self.draft.shape.head_dim, self.device)
        asked = tuning or Tuning()
        self.draft.compiled = self._flex if asked.compiled is None else asked.compiled
        self._fused = self._flex if asked.fused_head is None else asked.fused_head
        self._in_tiles = self._cold = self._flex or self.draft.compiled
        self._provenance = provenance(config.init) if config.init else ""
        if not config.init:
            self.draft.start_head(self.lm_head)

    def loss(self, delivery: Delivery) -> Loss:
        """The loss of one batch; its backward must run before the delivery's tensors are given up."""
        batch, taps, final = delivery.batch, delivery.taps, delivery.final
        assert taps is not None, "the capture spec of an EAGLE-3 draft has taps"
        assert final is not None, "and the final state"
        self.warm_up(taps.dtype)
        rows = rows_of(batch, self.config.num_steps)
        if self._in_tiles:
            rows = in_tiles(rows)
        with sharing(self.draft.midlayer, self.dtype):
            read = self._steps(batch, rows, taps.flatten(1).detach().to(self.dtype))
        teacher = Teacher(
            self.lm_head,
            self.draft.vocabulary,
            self.transform,
            final.detach().to(self.dtype)[to_device(rows.teachers, self.device)],
            self.config.loss_chunk,
        )
        weights = [self.config.loss_decay**step for step in range(self.config.num_steps)]
        own = self.draft.lm_head.weight
        total, counted, correct = taught_loss(read, own, teacher, rows.taught, weights, self._fused)
        return Loss(total, counted[0], {"correct": correct, "counted": counted})

    def _steps(self, batch: Batch, rows: Rows, taps: Tensor) -> Tensor:
        """Taps [T, n·H] -> what lm_head reads of all predictions, one step after the other."""
        draft, starts, tokens = self.draft, rows.starts, np.append(batch.tokens, 0).astype(np.int64)
        attend = attention(self._flex, rows.queries[0], starts, self.device)
        first, everything = draft.enter(taps), np.arange(starts.size)
        states = F.pad(first, (0, 0, 0, starts.size - batch.num_tokens))
        context: KeyValue | None = None
        later: list[KeyValue] = []
        old, read = everything, []
        for step, now in enumerate(rows.queries):
            # Every row is a key of the first step, whether it predicts or not; of later ones only a row of its own.
            keyed = everything if context is None else now
            if context is not None and now is not old:
                kept = to_device(np.searchsorted(old, now), self.device)
                states = states.index_select(0, kept)
                later = [(keys.index_select(0, kept), values.index_select(0, kept)) for keys, values in later]
            following = to_device(tokens[np.minimum(keyed + 1 + step, batch.num_tokens)], self.device)
            rope = draft.rope(to_device(keyed - starts[keyed] + step, self.device), taps.dtype)
            joined, *own = draft.keyed(F.embedding(following, self.embedding), states, rope)
            if context is None:
                context, chosen = (own[0], own[1]), to_device(now, self.device)
                joined, states = joined.index_select(0, chosen), states.index_select(0, chosen)
                rope = rope[0].index_select(0, chosen), rope[1].index_select(0, chosen)
            else:
                later.append((own[0], own[1]))
            attended = attend(draft.queries(joined, rope), now, context, later)
            states, normed = draft.after(states, attended)
            read.append(normed.index_select(0, to_device(rows.counting[step], self.device)))
            old = now
        return torch.cat(read)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Train on a batch of made-up tokens and forget it: kernels are shaped by the sizes they meet first.

        dtype: of taps and final state.
        """
        if not self._cold:
            return
        self._cold = False
        logger.info("compiling the draft's step for %s: up to a minute, seconds from the next run on", self.device)
        began = time.perf_counter()
        shape, (batch, sizes) = self.draft.shape, made_up(self.draft.shape)
        states = torch.zeros(batch.num_tokens, shape.num_taps + 1, shape.hidden_size, dtype=dtype, device=self.device)
        # The attention's end is compiled for each number of steps behind it.
        with torch.enable_grad(), compiling_for(*sizes, graphs=self.config.num_steps):
            loss = self.loss(Delivery(batch, states[:, :-1], states[:, -1]))
            loss.sum.backward()  # type: ignore[no-untyped-call]
        self.module.zero_grad()
        logger.info("compiled in %.0f s", time.perf_counter() - began)

    def facts(self) -> dict[str, str]:
        """See Objective.facts."""
        shape = self.draft.shape
        return {
            "layers": "1",
            "trained parameters": f"{sum(parameter.numel() for parameter in self.module.parameters()):,}",
            "taps": ", ".join(map(str, shape.taps)),
            "steps": str(shape.num_steps),
            "draft vocabulary": f"{shape.draft_vocab_size:,} of {shape.vocab_size:,}, {self._covered:.1%} of labels",
            "computes in": str(self.dtype).removeprefix("torch."),
        } | ({FACT: self._provenance} if self._provenance else {})

    def export(self, path: Path, files: Mapping[str, bytes] | None = None) -> None:
        """See Objective.export; its weights are written in the dtype it computes in."""
        readme = model_card(self.draft.shape, self._target, self.facts())
        save_draft(self.draft, path, dtype=self.dtype, files={**(files or {}), "README.md": readme})


def made_up(shape: Eagle3Shape) -> tuple[Batch, tuple[int, int]]:
    """A batch that can be compiled for, and its R and T: whole tiles, and neither they nor their tiles a known size.

    Sizes that are equal when a function is compiled are taken to be equal always.
    """
    heads, kv, hidden = shape.num_heads, shape.num_kv_heads, shape.hidden_size
    known = {TILE, shape.num_taps * hidden, hidden, 2 * hidden, shape.intermediate_size, heads, kv, heads // kv}
    known |= {shape.head_dim * count // 2 for count in (1, 2, 2 * heads, 2 * kv)}
    for more_rows, more_context in itertools.product(range(64), repeat=2):
        rows, context = TILE * (COMPILED_ROWS + more_rows), TILE * (COMPILED_CONTEXT + more_context)
        if rows < context and len({part // unit for part in (rows, context) for unit in (1, TILE)} - known) == 4:
            lengths = np.array([rows + 2, context - rows - 2], np.int32)
            batch = Batch(
                tokens=np.zeros(context, np.int32),
                lengths=lengths,
                loss_mask=np.arange(context) < lengths[0],
                samples=(0, 1),
            )
            return batch, (rows, context)
    raise AssertionError("64² sizes and fewer than 20 that are known")
