"""A target's tokenizer: texts to token ids and labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from specd.data.chat import Rendered
from specd.data.template import Span
from specd.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Encoder:
    """Texts to token ids and labels, many at once on all cores."""

    __slots__ = ("_core", "size", "tokenizer")

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """tokenizer: one with a `tokenizers` core, because labels are found by character offsets."""
        from tokenizers import Tokenizer

        self.tokenizer = tokenizer
        # With trimmed offsets a whitespace token has no characters, and could not be told a label.
        core: Any = tokenizer.backend_tokenizer
        state = core.to_str().replace('"trim_offsets":true', '"trim_offsets":false')
        self._core = Tokenizer.from_str(state)
        self._core.no_truncation()
        self._core.no_padding()
        self.size = max(len(tokenizer), self._core.get_vocab_size())
        """Size of the vocabulary, added tokens included."""

    def encode(self, texts: Sequence[Rendered]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """(tokens int32, loss mask bool) of each text. A token is a label when it begins inside a span.

        A document gets what the tokenizer writes around one, as BOS, which are no labels; but no second BOS where the
        text begins with it.
        """
        coded: list[Any] = [None] * len(texts)
        for document in (False, True):
            places = [place for place, rendered in enumerate(texts) if rendered.document is document]
            found = self._core.encode_batch([texts[place].text for place in places], add_special_tokens=document)
            for place, encoding in zip(places, found, strict=True):
                coded[place] = encoding
        for rendered, encoding in zip(texts, coded, strict=True):
            tokens = np.array(encoding.ids, np.int32)
            mask = _labels(np.array([begin for begin, _ in encoding.offsets], np.int64), rendered.spans)
            if rendered.document and tokens.size:
                added = np.array(encoding.special_tokens_mask, np.bool_)
                mask &= ~added
                if added[0] and tokens.size > 1 and tokens[1] == tokens[0]:
                    tokens, mask = tokens[1:], mask[1:]
            yield tokens, mask


def _labels(begins: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Which tokens begin inside a span. begins: the character that each one begins at. spans: ascending, apart."""
    if not spans:
        return np.zeros(begins.size, np.bool_)
    starts, ends = np.array(spans, np.int64).T
    place = np.searchsorted(starts, begins, side="right") - 1
    labels: NDArray[np.bool_] = (place >= 0) & (begins < ends[place])
    return labels


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer whose files lie in `directory`. Raises DataError when it cannot be loaded or gives no offsets."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise DataError(
                f"the tokenizer in {str(directory)!r} is Python code that came with its checkpoint, which trainers "
                f"do not run: write it as a tokenizer.json, and start the target with --tokenizer DIR"
            ) from None
        raise DataError(
            f"no usable tokenizer in {str(directory)!r} ({first_line(error)}): conversations need the target's; "
            f"put its tokenizer.json there, or start the target with --tokenizer DIR"
        ) from None
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer in {str(directory)!r} gives no character offsets; convert it to a tokenizer.json"
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = _processors_template(directory / "chat_template.json")
    return tokenizer


def _processors_template(file: Path) -> str | dict[str, str] | None:
    """The template as older checkpoints of several modalities keep it; transformers gives it to processors alone."""
    try:
        found: str | dict[str, str] = msgspec.json.decode(file.read_bytes())["chat_template"]
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, KeyError, TypeError) as error:
        raise DataError(f"{file} holds no `chat_template` ({first_line(error)}); fetch the checkpoint again") from None
    return found


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a text: the tokenizer's, and those of the model's generation config.

    Raises DataError when there is none.
    """
    configured = model.generation_config.eos_token_id if model.generation_config else None
    return _ends(tokenizer.eos_token_id, configured)


def ends_of(directory: Path) -> list[int]:
    """The same of a target whose files lie in `directory`, without the target itself."""
    files = [file for name in ("generation_config.json", "config.json") if (file := directory / name).is_file()]
    configured = [json.loads(file.read_bytes()).get("eos_token_id") for file in files]
    return _ends(load_tokenizer(directory).eos_token_id, *configured)


def _ends(*named: Any) -> list[int]:
    """The tokens among `named`: of each an id, a list of them, or None."""
    found = [token for ids in named for token in (ids if isinstance(ids, list) else [ids]) if isinstance(token, int)]
    if not found:
        raise DataError("the target's tokenizer names no end-of-sequence token; set eos_token in tokenizer_config.json")
    return list(dict.fromkeys(found))
