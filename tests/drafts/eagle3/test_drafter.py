"""EAGLE-3 guesses in decoding what it would by its definition."""

from __future__ import annotations

import msgspec
import pytest
import torch

from drafts import HIDDEN, VOCAB
from eagle import CONFIG, chain, make_eagle
from specd.drafts.eagle3.drafter import Eagle3Drafter
from specd.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, {}),
        ({"norm_output": True, "fc_norm": True}, {}),
        ({}, {"norm_before_fc": True, "norm_before_residual": True, "attention_bias": True}),
    ],
)
def test_guesses_are_those_of_the_definition(options: dict[str, bool], shape: dict[str, bool]) -> None:
    """Each reads the guess before it; the states of guesses are dropped once the text goes on."""
    objective = make_eagle(msgspec.structs.replace(CONFIG, **options), shape=shape)
    draft, steps = objective.draft, CONFIG.num_steps
    tokens = torch.randint(0, VOCAB, (19,), generator=torch.Generator().manual_seed(5))
    taps = torch.randn(19, 3 * HIDDEN, generator=torch.Generator().manual_seed(6))
    drafter = Eagle3Drafter(draft, objective.embedding)
    assert drafter.block_size == steps + 1
    with torch.no_grad():
        for _ in range(2):
            drafter.reset()
            for begin, end in ((0, 1), (1, 2), (2, 9), (9, 13), (13, 18)):
                drafter.extend(tokens[begin:end], taps[begin:end])
                guesses = drafter.propose(int(tokens[end])).tolist()
                text = tokens[: end + 1].tolist()
                for step in range(steps):
                    read = chain(draft, objective.embedding, text, taps, end - 1, step + 1)[-1]
                    text.append(int(draft.vocabulary[(draft.lm_head.weight @ read).argmax()]))
                assert guesses == text[end + 1 :]


def test_another_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="evaluate it with its own target"):
        Eagle3Drafter(make_eagle().draft, torch.zeros(VOCAB + 1, HIDDEN))
