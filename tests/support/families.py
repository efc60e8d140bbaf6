"""The shapes of published chat templates, each with the special tokens as its family declares them.

`families/NAME/template.jinja` is in our own words: the tokens and the structure are the family's. `tool_use.jinja`
beside it is a family's second template, `family.json` its tokens.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import msgspec

HOME = Path(__file__).parent / "families"


class Family(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A family's tokens and template.

    opening: the text of its generation prompt. headers: what may stand before an answer of the history, where that is
    not the opening. rest: what its template writes between the prompt and a content, and is counted to the header
    because the prompt stops within it (gpt-oss's channel). ends: tokens that end what the target writes, by its model
    card. bos, eos, pad: named tokens. extra: declared as extra special tokens. special: added special tokens that the
    tokenizer's config does not name. plain: added tokens that are not special. configured: the list in
    generation_config.json; empty: there is no file. thought: the key under which a turn holds its thoughts. pieces: a
    core as SentencePiece's, which writes ▁ before words, else byte-level BPE. strings: its template takes the arguments
    of calls as JSON text only. refuses: names of the conversations (talks.py) that the template refuses. template: its
    chat template; second: the one named tool_use, or "".
    """

    name: str = ""
    opening: str
    headers: tuple[str, ...] = ()
    rest: str = ""
    ends: tuple[str, ...]
    eos: str
    bos: str | None = None
    pad: str | None = None
    extra: tuple[str, ...] = ()
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    configured: tuple[str, ...] = ()
    thought: str = "reasoning_content"
    pieces: bool = False
    strings: bool = False
    refuses: frozenset[str] = frozenset()
    template: str = ""
    second: str = ""

    def __str__(self) -> str:
        return self.name


def _read(directory: Path) -> Family:
    found = msgspec.json.decode((directory / "family.json").read_bytes(), type=Family)
    second = directory / "tool_use.jinja"
    return msgspec.structs.replace(
        found,
        name=directory.name,
        template=(directory / "template.jinja").read_text(encoding="utf-8"),
        second=second.read_text(encoding="utf-8") if second.is_file() else "",
    )


FAMILIES = tuple(_read(path.parent) for path in sorted(HOME.glob("*/family.json")))

CORPUS = (
    "Name a colour. Blue is one. And a fruit? Plum, for example. Is it Red or Blue? Say yes or no.",
    "Rain in Ulm? No rain. system user assistant tool model think functions commentary final analysis json weather",
)


@functools.cache
def core(pieces: bool) -> str:
    """A `tokenizers` core of a few hundred tokens, as JSON; the words of CORPUS are tokens with the space before."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    found: Any = Tokenizer(models.BPE(byte_fallback=pieces, unk_token="<unk>" if pieces else None))
    if pieces:
        found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        found.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        found.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = ["▁", *(chr(code) for code in range(33, 127))]
    else:
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    known = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))] if pieces else []
    trainer = trainers.BpeTrainer(
        vocab_size=len(known) + 500, special_tokens=known, initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(list(CORPUS) * 3, trainer)
    # Bytes are in the vocabulary of SentencePiece and no added tokens: "<0x0A>" in a text is no newline.
    return json.dumps(json.loads(found.to_str()) | {"added_tokens": []})


def write_family(family: Family, directory: Path) -> Path:
    """The files that a target of `family` ships beside its weights, in `directory`."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    found = Tokenizer.from_str(core(family.pieces))
    named = {"bos": family.bos, "eos": family.eos, "pad": family.pad}
    known = [token for token in (*family.special, *named.values(), *family.extra, *family.configured) if token]
    found.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in dict.fromkeys(known)])
    found.add_tokens([AddedToken(t, special=False, normalized=False) for t in family.plain])
    options: dict[str, Any] = {f"{name}_token": token for name, token in named.items() if token}
    if family.extra:
        options["extra_special_tokens"] = list(family.extra)
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=found, clean_up_tokenization_spaces=False, **options
    )
    template = family.template
    tokenizer.chat_template = {"default": template, "tool_use": family.second} if family.second else template
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(tokenizer)}))
    if family.configured:
        ids = tokenizer.convert_tokens_to_ids(list(family.configured))
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return directory
