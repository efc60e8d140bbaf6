"""What a draft must pass. Subclass it in a test of your own; a plug-in needs nothing of specd's tests:

class TestMine(DraftConformance):
    method = MyMethod
    settings = MyConfig(...)  # a small one
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
import torch

from specd.config.settings import Config
from specd.drafts.base import Loss, Method, Objective, TargetParts
from specd.protocol.batch import Batch, Delivery
from specd.protocol.contract import TargetContract

VOCAB, HIDDEN, LAYERS = 97, 32, 8
CONTRACT = TargetContract(
    model="tiny",
    model_type="llama",
    hidden_size=HIDDEN,
    num_layers=LAYERS,
    vocab_size=VOCAB,
    dtype="float32",
    weights="0",
)
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
    "rope_theta": 5000.0, "tie_word_embeddings": True, "model_type": "llama",
}  # fmt: skip


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's, as of a process that has set another."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class DraftConformance:
    """The contract of `specd.drafts.base.Method` and of what it makes, on a CPU in float32."""

    method: ClassVar[type[Method]]
    settings: ClassVar[Config]

    def objective(self, seed: int = 0) -> Objective:
        """A fresh draft beside a tiny target."""
        head = torch.randn(VOCAB, HIDDEN, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
        counts = np.random.default_rng(1).integers(1, 9, VOCAB)
        return self.method.objective(
            self.settings, TargetParts(CONTRACT, CONFIG, head, head, counts), "cpu", torch.float32, seed
        )

    def batch(self, *lengths: int, density: float = 0.8) -> Batch:
        """Sequences of random tokens; sample i is always the same text and the same labels."""
        texts = [np.random.default_rng([index, size]) for index, size in enumerate(lengths)]
        return Batch(
            tokens=np.concatenate(
                [rng.integers(0, VOCAB, size) for rng, size in zip(texts, lengths, strict=True)]
            ).astype(np.int32),
            lengths=np.array(lengths, np.int32),
            loss_mask=np.concatenate([rng.random(size) < density for rng, size in zip(texts, lengths, strict=True)]),
            samples=tuple(range(len(lengths))),
        )

    def deliver(self, batch: Batch) -> Delivery:
        """A batch with the states that the method asks for: a function of token and position in the sequence alone."""
        spec = self.method.capture(self.settings, CONTRACT)
        places = np.concatenate([np.arange(size) for size in batch.lengths])
        width = len(spec.taps) + spec.final
        table = torch.randn(VOCAB, width, HIDDEN, dtype=torch.float32, generator=torch.Generator().manual_seed(2))
        drift = torch.from_numpy(places).float()[:, None, None].mul(0.1).sin()
        states = table[torch.from_numpy(batch.tokens).long()] + drift
        final = states[:, -1] if spec.final else None
        return Delivery(batch, states[:, : len(spec.taps)] if spec.taps else None, final)

    def gradients(self, objective: Objective, loss: Loss) -> list[torch.Tensor]:
        """Gradients of a loss, which are then cleared."""
        loss.sum.backward()  # type: ignore[no-untyped-call]
        found = [weight.grad.clone() for weight in self.trained(objective) if weight.grad is not None]
        objective.module.zero_grad()
        return found

    def trained(self, objective: Objective) -> list[torch.nn.Parameter]:
        """The trainable parameters."""
        return [weight for weight in objective.module.parameters() if weight.requires_grad]

    def test_it_captures_what_the_target_has(self) -> None:
        spec = self.method.capture(self.settings, CONTRACT)
        assert spec.problem(LAYERS) is None
        sized = self.method.capture_config(self.settings)
        for dtype in ("float32", "bfloat16"):
            spec = self.method.capture(self.settings, msgspec.structs.replace(CONTRACT, dtype=dtype))
            states = len(spec.taps), spec.final, spec.dtype
            expected = sized.num_taps, sized.final, dtype if sized.dtype == "auto" else sized.dtype
            assert expected == states, f"slots would have another size for a target in {dtype}"

    def test_its_settings_survive_a_file_and_name_what_may_change(self) -> None:
        assert msgspec.convert(msgspec.to_builtins(self.settings), self.method.settings) == self.settings
        assert self.method.free <= set(self.method.settings.__struct_fields__)

    def test_every_parameter_is_trained_and_the_same_seed_gives_the_same_bits(self) -> None:
        """Whatever came before, and whatever dtype torch gives to tensors of none."""
        delivery = self.deliver(self.batch(24, 5, 17))
        found: list[list[torch.Tensor]] = []
        for around, default in enumerate((torch.float32, torch.bfloat16)):
            torch.manual_seed(around)
            with _default_dtype(default):
                objective = self.objective(seed=3)
                if around:  # of a held-out batch, which leaves no trace
                    objective.loss(self.deliver(self.batch(9, 11)))
                loss = objective.loss(delivery)
                found.append([loss.sum.detach(), loss.weight, *self.gradients(objective, loss)])
            assert len(found[-1]) == 2 + len(self.trained(objective)), "a parameter has no gradient"
            assert {value.dtype for value in found[-1]} == {torch.float32}
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
        three, four = (self.trained(self.objective(seed)) for seed in (3, 4))
        assert any(not torch.equal(a, b) for a, b in zip(three, four, strict=True))

    def test_a_loss_is_the_sum_of_its_sequences(self) -> None:
        """A step may be cut into batches anywhere: sums, weights and gradients add up."""
        whole, objective = self.batch(24, 5, 17), self.objective()
        together = objective.loss(self.deliver(whole))
        gradients = self.gradients(objective, together)
        parts: list[Loss] = []
        begin = 0
        for index, size in enumerate(whole.lengths.tolist()):
            rows = slice(begin, begin + size)
            alone = msgspec.structs.replace(
                whole,
                tokens=whole.tokens[rows],
                loss_mask=whole.loss_mask[rows],
                lengths=whole.lengths[index : index + 1],
                samples=whole.samples[index : index + 1],
            )
            parts.append(objective.loss(self.deliver(alone)))
            begin += size
        for part in parts:
            if part.sum.requires_grad:
                part.sum.backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(together.sum.detach(), torch.stack([part.sum.detach() for part in parts]).sum())
        torch.testing.assert_close(together.weight, torch.stack([part.weight for part in parts]).sum())
        for name, counts in together.metrics.items():
            torch.testing.assert_close(counts, torch.stack([part.metrics[name] for part in parts]).sum(0))
        added = [weight.grad for weight in self.trained(objective)]
        for mine, theirs in zip(gradients, added, strict=True):
            assert theirs is not None
            size = max(1.0, float(theirs.abs().max()))  # sums of large terms are rounded as these are
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * size)

    @pytest.mark.parametrize("labels", ["none", "too few in a row"])
    def test_a_batch_without_a_prediction_weighs_nothing(self, labels: str) -> None:
        batch = self.batch(20, 9)
        mask = np.zeros(29, np.bool_)
        if labels != "none":
            mask[4 : 4 + self.method.consecutive_labels - 1] = True
        objective = self.objective()
        loss = objective.loss(self.deliver(msgspec.structs.replace(batch, loss_mask=mask)))
        assert (float(loss.sum.detach()), float(loss.weight)) == (0.0, 0.0)
        assert all(not gradient.any() for gradient in self.gradients(objective, loss))

    def test_it_learns_one_batch_by_heart(self) -> None:
        objective, delivery = self.objective(), self.deliver(self.batch(30, 18))
        optimizer = torch.optim.AdamW(self.trained(objective), lr=1e-2)
        losses = []
        for _ in range(30):
            loss = objective.loss(delivery)
            (loss.sum / loss.weight).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.sum.detach() / loss.weight))
        assert losses[-1] < 0.8 * losses[0]

    def test_what_is_exported_is_read_back_and_guesses(self, tmp_path: Path) -> None:
        objective = self.objective(seed=5)
        objective.export(tmp_path / "draft", {"tokenizer.json": b"{}"})
        assert (tmp_path / "draft" / "tokenizer.json").read_bytes() == b"{}"
        config = msgspec.json.decode((tmp_path / "draft" / "config.json").read_bytes())
        assert set(config["architectures"]) & set(self.method.architectures)
        draft = self.method.load(tmp_path / "draft")
        head = torch.randn(VOCAB, HIDDEN, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
        tokens = torch.arange(30, 41)
        with torch.inference_mode():
            guesses = []
            for one in (draft, draft.untrained(5), draft.untrained(6)):
                drafter = one.drafter(head, head)
                assert drafter.taps == self.method.capture(self.settings, CONTRACT).taps
                for _ in range(2):  # the second text knows nothing of the first
                    drafter.reset()
                    states = torch.randn(11, len(drafter.taps) * HIDDEN, generator=torch.Generator().manual_seed(4))
                    drafter.extend(tokens[:6], states[:6])
                    drafter.extend(tokens[6:], states[6:])
                    guesses.append(drafter.propose(7))
        assert all(guess.shape == (drafter.block_size - 1,) and guess.dtype == torch.int64 for guess in guesses)
        assert all(int(guess.min()) >= 0 and int(guess.max()) < VOCAB for guess in guesses)
        assert torch.equal(guesses[0], guesses[1])
        assert torch.equal(guesses[0], guesses[2]), "it was exported with the weights of seed 5"

    def test_its_facts_are_for_people(self) -> None:
        facts = self.objective().facts()
        assert facts["taps"] == ", ".join(map(str, self.method.capture(self.settings, CONTRACT).taps))
        assert all(isinstance(value, str) and value for value in facts.values())
        work = self.method.workload(self.objective(), self.batch(24, 5))
        assert work.rows >= work.predictions > 0
        assert all(flops > 0 for flops in work.flops.values())
        for part in work.parts.values():
            part()
