"""The mask token: one that stands for what a draft has to guess, so that neither texts nor the target may have it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from specd.data.dataset import Dataset
from specd.data.tokenizer import load_tokenizer
from specd.errors import ConfigError, DataError

_RESERVED = re.compile(
    r"[<\[][|｜]?(reserved|unused|extra|place.?holder|dummy|special|control)[\w▁]*\d[|｜]?[>\]]", re.IGNORECASE
)
"""Names of tokens that a vocabulary keeps for later: <|reserved_special_token_0|>, <unused0>, [control_8], …"""


class MaskToken(NamedTuple):
    """A choice. reason: where it comes from, for people."""

    id: int
    reason: str


def candidates(directory: Path, size: int, target: str) -> list[MaskToken]:
    """Tokens that can be a mask token, the best first: ids behind the tokenizer's last one, then reserved tokens.

    directory: of the target's files. size: of its vocabulary, in rows of the embedding. target: its name.
    Raises ConfigError when there is none.
    """
    tokenizer = _tokenizer(directory)
    known: dict[str, int] = tokenizer.get_vocab() if tokenizer is not None else {}
    taken = {*_written(tokenizer, directory), *(tokenizer.all_special_ids if tokenizer is not None else ())}
    first = max(known.values(), default=size) + 1
    found = [
        MaskToken(token, f"the target's embedding has {size - first} rows more than its tokenizer has tokens")
        for token in range(first, size)
    ]
    reserved = sorted((token, name) for name, token in known.items() if token < size and _RESERVED.fullmatch(name))
    found += [
        MaskToken(token, f"the tokenizer reserves it as {name!r}") for token, name in reserved if token not in taken
    ]
    if not found:
        raise ConfigError(
            f"no mask token is known for target {target!r}, and its tokenizer has neither a reserved token nor fewer "
            f"tokens than the embedding: give --set draft.mask_token_id=ID, the id of a token that it never writes, or "
            f"--preset NAME for the recipe of a target with the same tokenizer"
        )
    return found


def choose(found: list[MaskToken], dataset: Dataset) -> MaskToken:
    """The first of some candidates that is not in the data. Raises ConfigError when all are."""
    for one in found:
        if not dataset.find(one.id)[0]:
            return one
    raise ConfigError(
        f"no mask token: each of the {len(found)} that the target's tokenizer leaves free occurs in the data, as "
        f"{found[0].id}; give --set draft.mask_token_id=ID, the id of a token that does not"
    )


def check_unwritten(token: int, directory: Path) -> None:
    """Raise ConfigError when the target writes `token`, as far as the files in `directory` say."""
    if reason := _written(_tokenizer(directory), directory).get(token):
        raise ConfigError(
            f"draft.mask_token_id={token}: {reason}; give the id of a token that the target never writes, or -1 and "
            f"one is chosen"
        )


def check_absent(token: int, dataset: Dataset) -> None:
    """Raise ConfigError when `token` is in the data: a draft could not tell it from what it has to guess."""
    count, row = dataset.find(token)
    if count:
        raise ConfigError(
            f"draft.mask_token_id={token}: the data has this token {count:,} times, first in row {row + 1}; give the "
            f"id of a token that neither texts nor the target have, or -1 and one is chosen"
        )


def _tokenizer(directory: Path) -> Any:
    """The tokenizer in `directory`, None where there is none."""
    if not any(directory.glob("*token*")) and not (directory / "vocab.json").is_file():
        return None  # transformers would guess, and say so
    try:
        return load_tokenizer(directory)
    except DataError:
        return None


def _written(tokenizer: Any, directory: Path) -> dict[int, str]:
    """Tokens that begin a text, that end one, or that the chat template writes; and which of it."""
    written: dict[int, str] = {}
    if tokenizer is not None:
        template = tokenizer.chat_template or ""
        texts = template.values() if isinstance(template, dict) else (template,)
        for token, added in tokenizer.added_tokens_decoder.items():
            if added.content and any(added.content in text for text in texts):
                written[token] = f"the chat template writes this token, {added.content!r}"
        for what in ("bos", "eos"):
            token = getattr(tokenizer, f"{what}_token_id")
            if isinstance(token, int):
                written[token] = f"it is the tokenizer's {what}_token, {getattr(tokenizer, f'{what}_token')!r}"
    for name in ("config.json", "generation_config.json"):
        for token in _ends(directory / name):
            written[token] = f"the target ends its texts with this token, as its {name} says"
    return written


def _ends(file: Path) -> list[int]:
    """The eos tokens in a configuration of the target."""
    try:
        found = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError):
        return []
    nested = found.get("text_config")
    ends = found.get("eos_token_id", nested.get("eos_token_id") if isinstance(nested, dict) else None)
    return [token for token in (ends if isinstance(ends, list) else [ends]) if isinstance(token, int)]
