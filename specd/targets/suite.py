"""The conformance suite of target backends. Subclass it in a test; a plug-in needs nothing of specd's tests:

class TestMine(TargetConformance):
    def make(self, directory):
        return MyTarget(TargetConfig(model=...))  # a small one
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
import torch

from specd.errors import TargetError
from specd.memory.fp8 import encode
from specd.protocol.batch import slot_layout
from specd.protocol.capture import FP8, CaptureSpec, StateDtype
from specd.targets.base import CaptureJob, Target

GUARD = 64
"""Bytes behind a slot that must not change."""


class TargetConformance:
    """The contract of `specd.targets.base.Target`.

    dtype: of the compared states. tolerance: between forwards of different shape; a merged batch may round
    differently from one alone, a repeated forward may not.
    """

    dtype: ClassVar[StateDtype] = "float32"
    tolerance: ClassVar[dict[str, Any]] = {"rtol": 1e-4, "atol": 1e-4}

    _made: ClassVar[Target | None] = None

    def make(self, directory: Path) -> Target:
        """A small target, made once for all tests. directory: an empty one, for its files."""
        raise NotImplementedError

    @pytest.fixture
    def target(self, tmp_path_factory: pytest.TempPathFactory) -> Target:
        """The target under test."""
        if self._made is None:
            type(self)._made = self.make(tmp_path_factory.mktemp("target"))
        assert self._made is not None
        return self._made

    @classmethod
    def teardown_class(cls) -> None:
        """Close the target twice: idempotent."""
        made, cls._made = cls._made, None
        if made is not None:
            made.close()
            made.close()

    def spec(self, target: Target) -> CaptureSpec:
        """Early, late and final states."""
        return CaptureSpec(taps=(0, target.contract.num_layers - 2), final=True, dtype=self.dtype)

    def job(self, target: Target, lengths: Sequence[int], seed: int = 0, spec: CaptureSpec | None = None) -> CaptureJob:
        """A job of random tokens, and a slot full of other bytes."""
        contract, spec = target.contract, spec or self.spec(target)
        layout = slot_layout(spec, contract.hidden_size, sum(lengths))
        slot = torch.full((layout.nbytes + GUARD,), 0xA5, dtype=torch.uint8, device=target.device)
        tokens = np.random.default_rng(seed).integers(0, contract.vocab_size, sum(lengths)).astype(np.int32)
        place = slot.numpy().data if target.device == "cpu" else slot
        return CaptureJob(tokens=tokens, lengths=np.array(lengths, np.int32), spec=spec, layout=layout, slot=place)

    def states(self, target: Target, *jobs: CaptureJob) -> list[dict[str, torch.Tensor]]:
        """Run jobs in one forward, wait for its completion, and read their slots."""
        done = target.run(jobs)
        if done is not None:
            done.wait()
        found = []
        for job in jobs:
            slot = torch.frombuffer(job.slot, dtype=torch.uint8) if target.device == "cpu" else job.slot.cpu()
            assert (slot[job.layout.nbytes :] == 0xA5).all(), "bytes behind the slot were written"
            found.append(
                {
                    ref.name: slot[ref.offset : ref.offset + ref.nbytes]
                    .view(getattr(torch, ref.dtype))
                    .view(ref.shape)
                    .float()
                    for ref in job.layout.tensors
                }
            )
        return found

    def test_the_same_forward_gives_the_same_bits(self, target: Target) -> None:
        first, again = (self.states(target, self.job(target, (9, 1, 14)))[0] for _ in range(2))
        for name, states in first.items():
            assert torch.equal(states, again[name])
            assert torch.isfinite(states).all()
            assert states.std() > 0

    def test_sequences_do_not_see_each_other(self, target: Target) -> None:
        """Packed, the last of three sequences has the states that it has alone."""
        packed = self.job(target, (9, 5, 14))
        alone = self.job(target, (14,))
        alone.tokens[:] = packed.tokens[-14:]
        together, apart = self.states(target, packed)[0], self.states(target, alone)[0]
        for name, states in apart.items():
            torch.testing.assert_close(together[name][-14:], states, **self.tolerance)

    def test_merged_batches_have_their_own_states(self, target: Target) -> None:
        jobs = [self.job(target, lengths, seed) for seed, lengths in enumerate(((6,), (3, 8), (11,)))]
        merged = self.states(target, *jobs)
        for seed, (lengths, found) in enumerate(zip(((6,), (3, 8), (11,)), merged, strict=True)):
            for name, states in self.states(target, self.job(target, lengths, seed))[0].items():
                torch.testing.assert_close(found[name], states, **self.tolerance)

    def test_a_tap_is_the_same_whatever_else_is_captured(self, target: Target) -> None:
        late = target.contract.num_layers - 2
        both = self.states(target, self.job(target, (12,)))[0]
        one = self.states(target, self.job(target, (12,), spec=CaptureSpec(taps=(late,), dtype=self.dtype)))[0]
        final = self.states(target, self.job(target, (12,), spec=CaptureSpec(taps=(), final=True, dtype=self.dtype)))[0]
        torch.testing.assert_close(one["taps"][:, 0], both["taps"][:, 1], **self.tolerance)
        torch.testing.assert_close(final["final"], both["final"], **self.tolerance)
        assert not torch.equal(both["taps"][:, 0], both["taps"][:, 1])

    def test_float8_states_are_its_own_encoded(self, target: Target) -> None:
        """Whatever backend: what is written to `slot_rows` of the target's dtype, with scales."""
        plain, scaled = (
            self.job(target, (9, 1, 14), spec=msgspec.structs.replace(self.spec(target), dtype=dtype))
            for dtype in (target.contract.dtype, FP8)
        )
        native, found = self.states(target, plain)[0], self.states(target, scaled)[0]
        own = getattr(torch, target.contract.dtype)
        for name, states_TNH in (("taps", native["taps"]), ("final", native["final"][:, None])):
            num_tokens, count, hidden = states_TNH.shape
            scales_NT = found[f"{name}_scale"].view(count, num_tokens)
            for k in range(count):
                codes, scales = torch.empty(num_tokens, hidden, dtype=torch.float8_e4m3fn), torch.empty(num_tokens)
                encode(states_TNH[:, k].to(own), codes, scales)
                assert torch.equal(scales_NT[k], scales)
                assert torch.equal(found[name].view(num_tokens, count, hidden)[:, k], codes.float())

    def test_a_bad_fill_is_refused_and_the_target_survives(self, target: Target) -> None:
        good, layers = self.job(target, (5,)), target.contract.num_layers
        for change in (
            {"tokens": np.full(5, target.contract.vocab_size, np.int32)},
            {"tokens": np.full(5, -1, np.int32)},
            {"lengths": np.array([4], np.int32)},
            {"layout": slot_layout(good.spec, target.contract.hidden_size, 4)},
            {"spec": CaptureSpec(taps=(layers - 1,), dtype=self.dtype)},
        ):
            with pytest.raises(TargetError):
                target.run([msgspec.structs.replace(good, **change)])
        self.states(target, good)

    def test_artifacts_match_the_contract(self, target: Target) -> None:
        """From several threads, as trainers ask."""
        contract = target.contract
        shape = (contract.vocab_size, contract.hidden_size)
        assert contract.artifacts["embedding"].shape == contract.artifacts["lm_head"].shape == shape
        found: dict[str, int] = {}

        def read(name: str) -> None:
            found[name] = target.artifact(name).nbytes

        threads = [threading.Thread(target=read, args=(name,)) for name in contract.artifacts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {name: ref.nbytes for name, ref in contract.artifacts.items()}
        config = msgspec.json.decode(bytes(target.artifact("config.json")))
        assert isinstance(config, dict)
        with pytest.raises(KeyError):
            target.artifact("no such artifact")
