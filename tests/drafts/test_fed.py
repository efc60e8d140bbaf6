"""A draft guesses as well as any where its target multiplies its embedding and bends its logits, whoever feeds it.

Engines take a draft's inputs from different places: SGLang calls the target's embedding, vLLM reads the draft's own
table or the target's bare rows, z-lab's package multiplies those by a figure of the draft's config.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from drafts import load_draft
from specd.config.settings import TargetConfig
from specd.drafts.base import Objective, TargetParts
from specd.drafts.dflash.method import DFlashMethod
from specd.drafts.dflash.settings import DFlashConfig
from specd.drafts.eagle3.method import Eagle3Method
from specd.drafts.eagle3.settings import Eagle3Config
from specd.protocol.batch import Batch, Delivery, slot_layout
from specd.protocol.capture import CaptureSpec
from specd.targets.base import CaptureJob, Target, slot_tensors
from specd.targets.registry import load_target

VOCAB, HIDDEN, STEPS, TRIPLES = 24, 64, 240, 48
FOLLOWS = np.random.default_rng(7).permutation(VOCAB - 1).astype(np.int32)
"""What comes behind each token; the last one is the mask."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"final_logit_softcapping": 30.0, "query_pre_attn_scalar": 16},
}
Feed = Callable[[Tensor], Tensor]


class Host(NamedTuple):
    """A tiny target as a daemon runs it, and as transformers does."""

    served: Target
    network: Any

    def parts(self) -> TargetParts:
        embedding, lm_head = (
            torch.frombuffer(bytearray(self.served.artifact(name)), dtype=torch.float32).view(VOCAB, HIDDEN)
            for name in ("embedding", "lm_head")
        )
        config = json.loads(bytes(self.served.artifact("config.json")))
        return TargetParts(self.served.contract, config, embedding, lm_head, np.ones(VOCAB, np.int64))

    def deliver(self, spec: CaptureSpec, seed: int) -> Delivery:
        """Triples of an anchor, which nothing foretells, the label that follows from it, and what is no label."""
        rng = np.random.default_rng(seed)
        first = rng.integers(0, VOCAB - 1, TRIPLES, dtype=np.int32)
        noise = rng.integers(0, VOCAB - 1, TRIPLES, dtype=np.int32)
        tokens = np.stack((first, FOLLOWS[first], noise), 1).reshape(-1)
        batch = Batch(
            tokens=tokens,
            lengths=np.array([tokens.size], np.int32),
            loss_mask=np.arange(tokens.size) % 3 < 2,
            samples=(seed,),
        )
        layout = slot_layout(spec, HIDDEN, tokens.size)
        slot = memoryview(bytearray(layout.nbytes))
        job = CaptureJob(tokens=tokens, lengths=batch.lengths, spec=spec, layout=layout, slot=slot)
        self.served.run([job])
        return Delivery(batch, **slot_tensors(job))


@pytest.fixture(scope="module", params=FAMILIES)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Host:
    config = transformers.AutoConfig.for_model(
        request.param, vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        tie_word_embeddings=True, pad_token_id=0, **FAMILIES[request.param],
    )  # fmt: skip
    factory: Any = transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    network = factory.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        network.get_input_embeddings().weight.normal_(0, 0.3)
    path = tmp_path_factory.mktemp(request.param)
    network.save_pretrained(path)
    return Host(load_target(TargetConfig(model=f"{path}/", device="cpu")), network)


def trained(objective: Objective, deliveries: list[Delivery]) -> None:
    optimizer = torch.optim.AdamW(objective.module.parameters())
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / STEPS)
        loss = objective.loss(deliveries[step % len(deliveries)])
        (loss.sum / loss.weight).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(objective.module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_dflash_guesses_right_as_each_engine_feeds_it(host: Host, tmp_path: Path) -> None:
    settings = DFlashConfig(
        num_layers=1, num_taps=2, block_size=2, num_anchors=64, loss="decay", mask_token_id=VOCAB - 1
    )
    spec = DFlashMethod.capture(settings, host.served.contract)
    objective = DFlashMethod.objective(settings, host.parts(), "cpu", torch.float32)
    seen, fresh = ([host.deliver(spec, seed) for seed in seeds] for seeds in (range(24), range(99, 103)))
    trained(objective, seen)
    objective.export(tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    table = host.parts().embedding
    own = load_file(tmp_path / "draft" / "model.safetensors").get("embed_tokens.weight", table)
    scale = config["dflash_config"].get("input_embedding_scale", 1.0)
    feeds: dict[str, Feed] = {
        "SGLang": host.network.get_input_embeddings(),
        "vLLM": lambda tokens: F.embedding(tokens, own),
        "z-lab": lambda tokens: F.embedding(tokens, table) * scale,
    }
    draft = load_draft(tmp_path / "draft")
    shares = {engine: share_right(draft, objective, feed, fresh) for engine, feed in feeds.items()}
    assert min(shares.values()) >= 0.85, shares
    if host.served.contract.embedding_scale != 1.0:
        bare = msgspec.structs.replace(host.served.contract, embedding_scale=1.0)
        objective = DFlashMethod.objective(settings, host.parts()._replace(contract=bare), "cpu", torch.float32)
        trained(objective, seen)
        share = share_right(objective.draft, objective, feeds["SGLang"], fresh)
        assert share < 0.3, "what it is fed with does not matter, so this proves nothing"


@torch.inference_mode()
def share_right(draft: Any, objective: Any, feed: Feed, deliveries: list[Delivery]) -> float:
    """Of the labels that the draft guesses, fed with `feed` and read with the target's bare lm_head."""
    found = [guess for delivery in deliveries for guess in guesses_right(draft, objective, feed, delivery)]
    return sum(found) / len(found)


def guesses_right(draft: Any, objective: Any, feed: Feed, delivery: Delivery) -> list[bool]:
    blocks = objective.draw(delivery.batch)
    columns = (blocks.tokens, blocks.positions, blocks.context_positions, blocks.rows, blocks.labels)
    tokens, positions, context, rows, labels = (torch.from_numpy(np.asarray(column)).long() for column in columns)
    assert delivery.taps is not None
    attend = objective.attention(blocks.layout)
    states = draft(delivery.taps.flatten(1), context, feed(tokens), positions, attend)[rows]
    found: list[bool] = ((states @ objective.lm_head.T).argmax(-1) == labels).tolist()
    assert len(found) == TRIPLES
    return found


def test_eagle3_guesses_alike_from_bare_and_from_scaled_rows(host: Host) -> None:
    """SGLang and vLLM give it the bare rows, which it norms first."""
    settings = Eagle3Config(num_steps=1, draft_vocab_size=0)
    spec = Eagle3Method.capture(settings, host.served.contract)
    objective = Eagle3Method.objective(settings, host.parts(), "cpu", torch.float32)
    trained(objective, [host.deliver(spec, seed) for seed in range(24)])
    fresh = host.deliver(spec, 99)
    shares = []
    for table in (host.parts().embedding, host.network.get_input_embeddings()(torch.arange(VOCAB)).detach()):
        objective.embedding = table
        metrics = objective.loss(fresh).metrics
        shares.append(float(metrics["correct"][0] / metrics["counted"][0]))
    assert shares[0] >= 0.9
    assert shares[1] == pytest.approx(shares[0], abs=0.05)
