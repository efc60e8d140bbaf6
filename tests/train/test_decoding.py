"""Real decoding at a daemon: the same texts as with the target's own cache, and prompts from held-out rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from specd.config.settings import ValidationConfig
from specd.errors import ConfigError
from specd.evaluate.decode import continued, greedy, speculate
from specd.protocol.batch import Batch, Delivery
from specd.protocol.capture import CaptureSpec
from specd.train.decoding import StreamedText, prompts_of
from specd.train.validation import Held

transformers = pytest.importorskip("transformers")
VOCAB = 41
PROMPTS = [[5, 6, 7, 8], [1], [9, 9, 9, 9, 2, 4]]
SPEC = CaptureSpec(taps=(1, 3), final=True, dtype="float32")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, eos_token_id=None,
        bos_token_id=None, initializer_range=0.25,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return transformers.LlamaForCausalLM(config).eval()


class Source:
    """States of a model as a daemon gives them, in a buffer that the next batch writes over."""

    def __init__(self, model: Any) -> None:
        self.model, self.batches = model, 0

    def stream(self, batches: Iterable[Batch]) -> Iterator[Delivery]:
        for batch in batches:
            self.batches += 1
            ids = torch.from_numpy(batch.tokens).long()[None]
            found = self.model.model(ids, output_hidden_states=True)
            states = torch.stack([found.hidden_states[tap + 1][0] for tap in SPEC.taps], 1)
            final = found.last_hidden_state[0].clone()
            yield Delivery(batch, states, final)
            states.fill_(float("nan"))
            final.fill_(float("nan"))


class Knowing:
    """Guesses the text it was told, wrong at every third token, and checks the states that it is given."""

    taps, block_size = SPEC.taps, 5

    def __init__(self, text: list[int]) -> None:
        self.text = text
        self.read: list[Tensor] = []

    def reset(self) -> None:
        self.read = []

    def extend(self, tokens: Tensor, taps: Tensor) -> None:
        assert not taps.isnan().any(), "read after the next batch came"
        self.read.append(taps)

    def propose(self, token: int) -> Tensor:
        known = sum(map(len, self.read)) + 1
        guesses = [self.text[at] if at < len(self.text) else 0 for at in range(known, known + 4)]
        return torch.tensor([(g + (at % 3 == 0)) % VOCAB for at, g in enumerate(guesses, known)])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_text_is_the_one_that_the_target_writes_with_its_cache(model: Any, prompt: list[int]) -> None:
    limits: dict[str, Any] = {"max_new_tokens": 24, "eos": ()}
    own = greedy(model, prompt, **limits)
    source, here, there = Source(model), Knowing([*prompt, *own.tokens]), Knowing([*prompt, *own.tokens])
    text = continued(StreamedText(source, model.lm_head.weight), there, prompt, **limits)
    cached = speculate(model, here, prompt, **limits)
    assert text.tokens == cached.tokens == own.tokens
    assert (text.drafted, text.accepted, text.forwards) == (cached.drafted, cached.accepted, cached.forwards)
    assert 0 < text.forwards < 23, "some are accepted, and some not"
    assert source.batches == text.forwards + 1
    torch.testing.assert_close(torch.cat(there.read), torch.cat(here.read), rtol=1e-4, atol=1e-4)


class Rows:
    """Four samples of three rows; the last one has an image."""

    rows = np.array([0, 0, 1, 2])
    texts = (([1, 2, 3, 4], 2), ([5, 6, 7], 1), ([8, 9, 10, 11, 12], 0), ([13, 14], 1))

    def tokens(self, i: int) -> Any:
        return np.array(self.texts[i][0], np.int32)

    def loss_mask(self, i: int) -> Any:
        return np.arange(len(self.texts[i][0])) >= self.texts[i][1]

    def pictures(self, i: int) -> tuple[Any, ...]:
        return (SimpleNamespace(),) if i == 3 else ()


def test_prompts_are_what_stands_before_the_first_label_of_a_row() -> None:
    rows: Any = Rows()
    held = Held(samples=np.array([True] * 4), rows=3)

    def ask(slot_bytes: int, longest: int = 0, **more: Any) -> list[list[int]]:
        config = ValidationConfig(decode_every=5, max_new_tokens=10, **more)
        return prompts_of(rows, held, config, SPEC, 32, slot_bytes, longest)

    assert ask(1 << 20) == [[1, 2], [8, 9, 10, 11, 12]]
    assert ask(1 << 20, prompts=1) == [[1, 2]]
    assert ask(1 << 20, longest=12) == [[1, 2]], "the other would go beyond the target's positions"
    with pytest.raises(ConfigError, match=r"validation\.decode_every=5: of 3 held-out rows no prompt"):
        ask(10 * 3 * 32 * 4)
