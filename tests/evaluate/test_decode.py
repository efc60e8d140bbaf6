"""Speculative decoding: the same text as the target's own whatever the draft guesses, and honest counts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from specd.drafts.backbone.drafter import BlockDrafter
from specd.drafts.backbone.network import Backbone
from specd.drafts.backbone.shape import draft_shape
from specd.drafts.dflash.settings import DFlashConfig
from specd.errors import ConfigError
from specd.evaluate.decode import Generation, evaluate, greedy, speculate
from specd.evaluate.results import PromptResult

transformers = pytest.importorskip("transformers")
VOCAB, HIDDEN, BLOCK = 41, 32, 5
PROMPTS = [[5, 6, 7, 8], [1], [9, 9, 9, 9, 9, 9, 9, 2, 4]]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.set_num_threads(1)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": request.param == "llama",
        "eos_token_id": None,
        "bos_token_id": None,
        "initializer_range": 0.25,
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if request.param == "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=8, **sizes)).eval()


def make_draft(model: Any, taps: tuple[int, ...] = (1, 3)) -> Backbone:
    config = DFlashConfig(num_layers=2, block_size=BLOCK, mask_token_id=0)
    return Backbone(draft_shape(config, model.config.to_dict(), taps))


def drafter(model: Any) -> BlockDrafter:
    return BlockDrafter(make_draft(model), model.get_input_embeddings().weight, model.get_output_embeddings().weight)


class Oracle:
    """Knows the text, and guesses the first `right` offsets of every block correctly and the next one wrong."""

    taps = (1,)
    block_size = BLOCK

    def __init__(self, prompt: Sequence[int], text: Sequence[int], right: int = BLOCK) -> None:
        self.whole, self.right, self.known = [*prompt, *text], right, 0
        self.blocks: list[int] = []

    def reset(self) -> None:
        self.known = 0

    def extend(self, tokens: Tensor, taps: Tensor) -> None:
        assert taps.shape == (len(tokens), HIDDEN)
        assert tokens.tolist() == self.whole[self.known : self.known + len(tokens)]
        self.known += len(taps)

    def propose(self, token: int) -> Tensor:
        # What the decoder says it knows must be the text so far: the states of all tokens but the last.
        assert token == self.whole[self.known]
        self.blocks.append(self.known)
        guesses = (self.whole[self.known + 1 : self.known + BLOCK] + [0] * BLOCK)[: BLOCK - 1]
        if self.right < len(guesses):
            guesses[self.right] = (guesses[self.right] + 1) % VOCAB
        return torch.tensor(guesses)


def plain(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding from the definition: the whole prefix again for every token."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_equals_decoding_without_a_cache(model: Any) -> None:
    for prompt in PROMPTS:
        text = greedy(model, prompt, max_new_tokens=20, eos=())
        assert list(text.tokens) == plain(model, prompt, 20)
        assert text.forwards == 19


def test_texts_are_worth_comparing(model: Any) -> None:
    assert any(len(set(greedy(model, prompt, max_new_tokens=20, eos=()).tokens)) > 3 for prompt in PROMPTS)


@pytest.mark.parametrize("right", [0, 1, 3, BLOCK])
def test_an_oracle_is_believed_as_far_as_it_is_right(model: Any, right: int) -> None:
    for prompt in PROMPTS:
        own = greedy(model, prompt, max_new_tokens=21, eos=())
        text = speculate(model, Oracle(prompt, own.tokens, right), prompt, max_new_tokens=21, eos=())
        assert text.tokens == own.tokens
        # 20 tokens after the first, in blocks that keep `kept` guesses and one token more; all but the last are full.
        kept = min(right, BLOCK - 1)
        assert text.forwards == -(-20 // (kept + 1))
        assert all(count >= 20 // (kept + 1) for count in text.accepted[:kept])
        assert not any(text.accepted[kept:])


@pytest.mark.parametrize("right", [0, 2, BLOCK])
def test_the_limit_is_met_exactly(model: Any, right: int) -> None:
    prompt = PROMPTS[0]
    own = greedy(model, prompt, max_new_tokens=12, eos=())
    for limit in range(1, 13):
        text = speculate(model, Oracle(prompt, own.tokens, right), prompt, max_new_tokens=limit, eos=())
        assert text.tokens == own.tokens[:limit]


def test_the_last_forward_counts_though_nothing_is_left_to_guess(model: Any) -> None:
    """One token is left after a full block: it takes a forward, and the definition says so."""
    prompt = PROMPTS[0]
    own = greedy(model, prompt, max_new_tokens=BLOCK + 2, eos=())
    result = evaluate(model, Oracle(prompt, own.tokens), [prompt], max_new_tokens=BLOCK + 2, eos=())
    assert (result.forwards, result.acceptance_length) == (2, (BLOCK + 1) / 2)
    assert "divided by target forwards after the prompt's own" in result.definition


def test_the_end_token_stops_a_text_wherever_in_a_block_it_falls(model: Any) -> None:
    prompt = PROMPTS[2]
    own = greedy(model, prompt, max_new_tokens=12, eos=())
    for token in set(own.tokens):
        end = own.tokens.index(token)
        for right in (2, BLOCK):
            text = speculate(model, Oracle(prompt, own.tokens, right), prompt, max_new_tokens=12, eos={token})
            assert text.tokens == own.tokens[: end + 1]
        assert greedy(model, prompt, max_new_tokens=12, eos={token}).tokens == text.tokens


def test_guesses_after_the_end_count_neither_as_drafted_nor_as_accepted(model: Any) -> None:
    prompt = PROMPTS[0]
    own = greedy(model, prompt, max_new_tokens=40, eos=())
    # The first token that appears late enough to end a text inside its first block.
    end = next((k for k in (2, 1) if own.tokens[k] not in own.tokens[:k]), None)
    if end is None:
        pytest.skip("this tiny target repeats itself from the start")
    text = speculate(model, Oracle(prompt, own.tokens), prompt, max_new_tokens=40, eos={own.tokens[end]})
    expected = tuple(int(k < end) for k in range(BLOCK - 1))
    assert (text.forwards, text.drafted, text.accepted) == (1, expected, expected)


def test_an_untrained_draft_changes_nothing_and_gains_about_nothing(model: Any) -> None:
    seen: list[PromptResult] = []
    result = evaluate(
        model, drafter(model), PROMPTS, max_new_tokens=24, eos=(), progress=lambda index, row: seen.append(row)
    )
    assert result.identical
    assert result.mismatches == ()
    assert 1.0 <= result.acceptance_length < 2.0
    assert result.new_tokens == 3 * 24
    assert result.forwards == sum(row.forwards for row in result.prompts)
    assert result.acceptance_length == pytest.approx(3 * 23 / result.forwards)
    assert tuple(seen) == result.prompts
    assert all(row.identical for row in seen)
    assert "divided by target forwards" in result.definition


def test_no_draft_is_plain_decoding(model: Any) -> None:
    result = evaluate(model, None, PROMPTS, max_new_tokens=9, eos=())
    assert result.identical
    assert result.acceptance_length == 1.0
    assert result.acceptance_by_offset == ()


def logits_after(model: Any, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return logits


def test_a_wrong_text_is_reported_with_place_tokens_and_the_margin_between_them(model: Any) -> None:
    own = [greedy(model, prompt, max_new_tokens=9, eos=()) for prompt in PROMPTS]
    best = own[1].tokens
    wrong = int(logits_after(model, [*PROMPTS[1], *best[:4]]).argmin())
    texts = [own[0], Generation(tokens=(*best[:4], wrong, *best[5:]), forwards=8, seconds=1.0), own[2]]
    result = evaluate(model, drafter(model), PROMPTS, max_new_tokens=9, eos=(), references=texts)
    assert not result.identical
    assert [row.identical for row in result.prompts] == [True, False, True]
    (mismatch,) = result.mismatches
    assert (mismatch.prompt, mismatch.position) == (1, 4)
    assert (mismatch.expected, mismatch.got) == (wrong, best[4])
    logits = logits_after(model, [*PROMPTS[1], *best[:4]])
    assert mismatch.margin == pytest.approx(float(logits[wrong] - logits[best[4]]), rel=1e-4)
    assert mismatch.rounding == pytest.approx(4 * 2**-23 * float(logits.abs().max()), rel=1e-4)
    assert not mismatch.tie
    shorter = [Generation(tokens=text.tokens[:5], forwards=4, seconds=1.0) for text in own]
    (mismatch, *_) = evaluate(model, None, PROMPTS[:1], max_new_tokens=9, eos=(), references=shorter).mismatches
    assert (mismatch.position, mismatch.expected, mismatch.got) == (5, None, own[0].tokens[5])
    assert not mismatch.tie


def test_rounding_of_a_coarse_dtype_is_told_from_a_fault(model: Any) -> None:
    """bfloat16 rounds a block otherwise than single tokens: what differs then is a tie, a made-up token is not."""
    coarse = copy.deepcopy(model).to(torch.bfloat16)
    prompts = [[k, k + 1] for k in range(1, 16)]
    result = evaluate(coarse, drafter(coarse), prompts, max_new_tokens=24, eos=())
    assert all(mismatch.tie for mismatch in result.mismatches)
    own = [greedy(coarse, prompt, max_new_tokens=3, eos=()) for prompt in prompts]
    forged = [
        Generation(
            tokens=(text.tokens[0], int(logits_after(coarse, [*prompt, text.tokens[0]]).argmin()), 0),
            forwards=2,
            seconds=1.0,
        )
        for prompt, text in zip(prompts, own, strict=True)
    ]
    result = evaluate(coarse, None, prompts, max_new_tokens=3, eos=(), references=forged)
    assert len(result.mismatches) == len(prompts)
    assert not any(mismatch.tie for mismatch in result.mismatches)


def test_acceptance_by_offset_is_the_share_of_blocks(model: Any) -> None:
    prompt = PROMPTS[0]
    own = greedy(model, prompt, max_new_tokens=13, eos=())
    result = evaluate(model, Oracle(prompt, own.tokens, 2), [prompt], max_new_tokens=13, eos=())
    # Twelve tokens in blocks of three kept; every one of the four blocks is full but the last, which verifies three.
    assert result.acceptance_length == 3.0
    assert result.forwards == 4
    assert result.acceptance_by_offset == (1.0, 1.0, 0.0, 0.0)
    (row,) = result.prompts
    assert (row.drafted, row.accepted) == ((4, 4, 3, 3), (4, 4, 0, 0)), "by prompt, for the intervals"


def test_a_cached_draft_equals_one_that_reads_the_whole_context_each_time(model: Any) -> None:
    draft = make_draft(model)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    taps = torch.randn(17, 2 * HIDDEN, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(17)
    cached = BlockDrafter(draft, embedding, head)
    with torch.no_grad():
        for begin, end in ((0, 9), (9, 10), (10, 13), (13, 17)):
            cached.extend(tokens[begin:end], taps[begin:end])
            cached.propose(7)
            fresh = BlockDrafter(draft, embedding, head)
            fresh.extend(tokens[:end], taps[:end])
            assert torch.equal(cached.propose(7), fresh.propose(7))
            for one, other in zip(cached._cache, fresh._cache, strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # dflash gives it so
def test_the_drafter_agrees_with_the_published_decoder(model: Any) -> None:
    """The same guesses in every full block, and the same text."""
    module = pytest.importorskip("dflash.model", reason="the published implementation is a development dependency")
    draft = make_draft(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    shape = draft.shape
    config = transformers.Qwen3Config(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        vocab_size=VOCAB,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        dflash_config={"mask_token_id": 0, "target_layer_ids": [1, 3]},
        block_size=BLOCK,
        num_target_layers=6,
    )
    theirs = module.DFlashDraftModel(config).eval()
    theirs.load_state_dict(draft.state_dict())

    guessed: list[list[int]] = []

    class Theirs(module.DFlashDraftModel):  # type: ignore[misc, name-defined]
        def compute_logits(self, hidden: Tensor, output_head: Any) -> Any:
            logits = super().compute_logits(hidden, output_head)
            guessed.append(logits[0].argmax(-1).tolist())
            return logits

    class Ours(BlockDrafter):
        def propose(self, token: int) -> Tensor:
            guesses = super().propose(token)
            guessed.append(guesses.tolist())
            return guesses

    theirs.__class__ = Theirs
    for prompt in PROMPTS:
        output = module.dflash_generate(theirs, model, torch.tensor([prompt]), 22, None)
        expected, guessed = guessed, []
        ours = Ours(draft, model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        text = speculate(model, ours, prompt, max_new_tokens=22, eos=())
        assert list(text.tokens) == output[0, len(prompt) :].tolist()
        # The last blocks have less room: theirs drafts fewer tokens there, ours drafts all and verifies fewer.
        full = [block for block in expected if len(block) == BLOCK - 1]
        assert len(full) > 3
        assert guessed[: len(full)] == full
        guessed = []


def test_bad_arguments_are_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match="prompt of 0 tokens"):
        greedy(model, [], max_new_tokens=3, eos=())
    with pytest.raises(ConfigError, match="max_new_tokens 0"):
        speculate(model, Oracle([1], [2]), [1], max_new_tokens=0, eos=())
    with pytest.raises(ConfigError, match="evaluate it with its own target"):
        BlockDrafter(make_draft(model), torch.zeros(7, HIDDEN), torch.zeros(7, HIDDEN))
