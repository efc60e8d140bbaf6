"""Results of an evaluation, as stored in a run's directory."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from specd.data.faults import Fault
from specd.errors import CheckpointError

T = TypeVar("T")
DEFINITION = (
    "acceptance length = tokens generated after the first, divided by target forwards after the prompt's own; each of "
    "them yields the guesses it accepts and one token of the target's; the first token comes from the prompt's "
    "forward and is not counted; tokens cut off by the end of the text or by max_new_tokens are not counted either, so "
    "1.0 is plain decoding"
)
ROUNDINGS = 4
"""Two logits within this many epsilons of the largest |logit| are a tie.

Two runs compute two logits each, and each of the four is off by up to one epsilon: half for its own rounding, half for
that of the states under it.
"""


class PromptResult(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt of an evaluation; the times are wall seconds of the whole text, its prompt included."""

    prompt_tokens: int
    new_tokens: int
    forwards: int
    acceptance_length: float
    identical: bool
    seconds: float
    greedy_seconds: float


class Mismatch(msgspec.Struct, frozen=True, kw_only=True):
    """The first difference between a text and the target's own. expected, got: tokens there, None past the end.

    margin: by how much the expected token's logit leads the other's when the target reads the text up to there at once.
    rounding: the largest margin that is a tie in the target's dtype: ROUNDINGS · epsilon · the largest |logit| there.
    """

    prompt: int
    position: int
    expected: int | None
    got: int | None
    margin: float
    rounding: float = 0.0

    @property
    def tie(self) -> bool:
        """Whether the two logits are equal within rounding: no fault of the decoding."""
        return self.expected is not None and self.got is not None and abs(self.margin) <= self.rounding


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """Results of a draft on a set of prompts.

    acceptance_length: over all prompts, as `definition` says. acceptance_by_offset: of the blocks that verified a
    guess at offset 1, 2, …, the share in which it was accepted. identical: every text equals the target's own greedy
    one, token for token. tokens_per_s, greedy_tokens_per_s: with the draft and without it.
    """

    acceptance_length: float
    acceptance_by_offset: tuple[float, ...]
    identical: bool
    mismatches: tuple[Mismatch, ...]
    new_tokens: int
    forwards: int
    tokens_per_s: float
    greedy_tokens_per_s: float
    prompts: tuple[PromptResult, ...]
    definition: str = DEFINITION


EVALS = {"untrained": "eval-untrained.json", "unary": "eval-unary.json", "trained": "eval.json"}
"""File of each evaluation in the run directory."""


class EvalFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One evaluation by real decoding, and its settings.

    untrained: the draft had its initial weights. source: the prompts, as they were given. bad: the rows of it that
    cannot be used. dtype: the target's.
    """

    model: str
    draft: str
    untrained: bool
    block_size: int
    max_new_tokens: int
    source: str = ""
    bad: tuple[Fault, ...] = ()
    dtype: str = ""
    result: Evaluation

    @property
    def acceptance_length(self) -> float:
        """Over all prompts, see DEFINITION."""
        return self.result.acceptance_length

    @property
    def prompts(self) -> int:
        """How many texts were decoded."""
        return len(self.result.prompts)

    @property
    def identical(self) -> int:
        """How many texts equal the target's own."""
        return sum(row.identical for row in self.result.prompts)

    @property
    def ties(self) -> int:
        """How many texts first differ at a tie."""
        return sum(miss.tie for miss in self.result.mismatches)

    @property
    def different(self) -> int:
        """How many texts differ, not at a tie."""
        return len(self.result.mismatches) - self.ties

    @property
    def texts(self) -> tuple[object, ...]:
        """Identity of what was decoded, under which limits: equal ones can be compared."""
        lengths = tuple(row.prompt_tokens for row in self.result.prompts)
        return self.model, self.source, self.dtype, self.block_size, self.max_new_tokens, lengths


def load_facts(path: Path, kind: type[T]) -> T:
    """A JSON file of a run, as `kind`. Raises CheckpointError when it is not there or damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; give the --output of a `specd train`") from None
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; restore it, or delete it and create it again") from None
