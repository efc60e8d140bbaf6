"""Whether a checkpoint is the target that a run was trained on."""

from __future__ import annotations

from specd.errors import ConfigError
from specd.protocol.contract import FINGERPRINT
from specd.targets.digest import text_digests, weights_digest
from specd.targets.source import Source

_SHOWN = 12
"""Characters of a digest that a message needs."""


def check_same(source: Source, fingerprint: str, *, run: str) -> None:
    """Raise ConfigError unless `source` has the weights, tokenizer and chat template that `fingerprint` names.

    The dtype does not matter, nor whatever a backend made of them. fingerprint: of the target's contract in training.
    run: whose it is, for the message.
    """
    parts = fingerprint.split(":")
    if len(parts) != len(FINGERPRINT):
        raise ConfigError(f"{run} has the target fingerprint {fingerprint!r}: expected {':'.join(FINGERPRINT)}")
    trained: dict[str, str] = dict(zip(FINGERPRINT, parts, strict=True))
    if trained["weights"].startswith("dummy-"):
        raise ConfigError(
            f"{run} was trained on made-up weights (load_format dummy), so there is no target to evaluate it on; give "
            f"--other-target to try it on {source.name} all the same"
        )
    assert source.path is not None, "weights are asked for"
    tokenizer, template = text_digests(source.files())
    found = {"weights": weights_digest(source.path), "tokenizer": tokenizer, "chat_template": template}
    if differing := [name for name in found if found[name] != trained[name]]:
        reasons = ", ".join(
            f"{name.replace('_', ' ')} {_short(found[name])}, expected {_short(trained[name])}" for name in differing
        )
        texts = "" if "weights" in differing else ", --tokenizer DIR with its tokenizer"
        raise ConfigError(
            f"target {source.name!r} is not the one that {run} was trained on: {reasons}. Give --model DIR with that "
            f"one{texts}, or --other-target to evaluate on this one, whose figures are then not kept with the run"
        )


def _short(digest: str) -> str:
    return digest[:_SHOWN] or "none"
