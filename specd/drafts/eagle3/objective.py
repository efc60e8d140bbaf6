"""The EAGLE-3 objective: several steps of the draft on its own states, taught by the target's distribution.

Steps are those of training-time test (arXiv 2503.01840): tokens come from the text, states from the draft itself.
Shape legend: T tokens of a batch, R rows of a step, U teacher rows, n taps, H hidden size, V vocabulary, W draft
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from specd.drafts.base import Loss, TargetParts
from specd.drafts.block_attention import to_device
from specd.drafts.eagle3.attention import attend
from specd.drafts.eagle3.export import model_card, save_draft
from specd.drafts.eagle3.rows import Rows, rows_of
from specd.drafts.eagle3.settings import Eagle3Config
from specd.drafts.eagle3.start import started
from specd.drafts.initial import FACT, provenance
from specd.drafts.layers import KeyValue
from specd.drafts.taught import Teacher, taught_loss
from specd.drafts.vocabulary import covered
from specd.protocol.batch import Batch, Delivery


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
        self._provenance = provenance(config.init) if config.init else ""
        if not config.init:
            self.draft.start_head(self.lm_head)

    def loss(self, delivery: Delivery) -> Loss:
        """The loss of one batch; its backward must run before the delivery's tensors are given up."""
        batch, taps, final = delivery.batch, delivery.taps, delivery.final
        assert taps is not None, "the capture spec of an EAGLE-3 draft has taps"
        assert final is not None, "and the final state"
        rows = rows_of(batch, self.config.num_steps)
        read = self._steps(batch, rows, taps.flatten(1).detach().to(self.dtype))
        teacher = Teacher(
            self.lm_head,
            self.draft.vocabulary,
            self.transform,
            final.detach().to(self.dtype)[to_device(rows.teachers, self.device)],
            self.config.loss_chunk,
        )
        weights = [self.config.loss_decay**step for step in range(self.config.num_steps)]
        total, counted, correct = taught_loss(read, self.draft.lm_head.weight, teacher, rows.taught, weights)
        return Loss(total, counted[0], {"correct": correct, "counted": counted})

    def _steps(self, batch: Batch, rows: Rows, taps: Tensor) -> Tensor:
        """Taps [T, n·H] -> what lm_head reads of all predictions, one step after the other."""
        draft, layer = self.draft, self.draft.midlayer
        attention = layer.self_attn
        starts, tokens = rows.starts, np.append(batch.tokens, 0).astype(np.int64)
        first = draft.enter(taps)
        context: KeyValue | None = None
        later: list[KeyValue] = []
        states, old, read = first, np.arange(batch.num_tokens), []
        for step, now in enumerate(rows.queries):
            # Every row is a key of the first step, whether it predicts or not; of later ones only a row of its own.
            keyed = np.arange(batch.num_tokens) if context is None else now
            if context is not None:
                kept = to_device(np.searchsorted(old, now), self.device)
                states = states[kept]
                later = [(keys[kept], values[kept]) for keys, values in later]
            following = to_device(tokens[np.minimum(keyed + 1 + step, batch.num_tokens)], self.device)
            rope = draft.rope(to_device(keyed - starts[keyed] + step, self.device), taps.dtype)
            joined = layer.join(F.embedding(following, self.embedding), states)
            own = attention.keys_values(joined, rope)
            if context is None:
                context, chosen = own, to_device(now, self.device)
                joined, states = joined[chosen], states[chosen]
                rope = rope[0][chosen], rope[1][chosen]
            else:
                later.append(own)
            query = attention.queries(joined, rope)
            states, normed = draft.finish(layer.leave(states, attend(query, now, starts, context, later).flatten(1)))
            read.append(normed[to_device(rows.counting[step], self.device)])
            old = now
        return torch.cat(read)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Nothing is compiled."""

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
