"""What a row holds, whatever its columns are called: a conversation, a text, or token ids with their labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain, cycle
from typing import Any

import msgspec

from specd.config.settings import DataConfig
from specd.data.faults import TOO_DEEP, RowError, short
from specd.data.images import FOLDER, PLACE, Picture, picture
from specd.data.tokens import MASKS, read_tokens
from specd.data.tokens import Tokens as Tokens
from specd.data.tools import read_tools, without_nulls
from specd.data.turns import Turn as Turn
from specd.data.turns import Turns, listed, read_turns
from specd.errors import ConfigError

TURNS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "instruction", "question", "query")
COMPLETIONS = ("completion", "response", "output", "answer", "chosen")
IMAGES = ("images", "image")
"""Columns of images that the turns have places for."""
BESIDE = ("input", "history", "system", "system_prompt", "tools", "functions", "finish_reason", "chat_template_kwargs")
"""Columns that are read beside a prompt or turns."""
COLUMNS = (
    *TURNS,
    *PROMPTS,
    *COMPLETIONS,
    *BESIDE,
    *IMAGES,
    FOLDER,
    "text",
    "input_ids",
    "labels",
    *MASKS,
    "attention_mask",
    "form",
)
"""The names of columns that specd reads."""
FORMS = (
    "`messages` or `conversations` (a conversation), `prompt` and `completion` (also `instruction`, `question` or "
    "`query`, and `output`, `response` or `answer`), `chosen`, `text`, or `input_ids` (with `labels` or `loss_mask`)"
)


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """turns: of known roles, without specd's own keys. tools: what the template gets beside them, or None.

    cut: places of answers that ended at a length limit, so that the target did not write their end. context: places of
    answers that are no labels, as the row asks. options: variables of the template for this row alone. pictures: its
    images, in order; `images.PLACE` stands for each in the texts.
    """

    turns: list[Turn]
    tools: list[Any] | None = None
    cut: frozenset[int] = frozenset()
    context: frozenset[int] = frozenset()
    options: dict[str, Any] = {}
    pictures: tuple[Picture, ...] = ()


class Text(msgspec.Struct, frozen=True, kw_only=True):
    """A text: one that already went through the chat template, or a plain document.

    prompt: characters at its begin that were given, and are no labels.
    """

    text: str
    prompt: int = 0


Form = Conversation | Text | Tokens


def check(config: DataConfig) -> None:
    """Raise ConfigError for names in `data.columns` that specd does not read."""
    unknown = [name for name in config.columns if name not in COLUMNS]
    if unknown:
        raise ConfigError(
            f"data.columns maps {', '.join(map(repr, unknown))}: expected a name that specd reads, and then the "
            f"file's own, as {{prompt: question}}; specd reads {', '.join(COLUMNS)}"
        )


def read(row: Mapping[str, Any], where: str, config: DataConfig) -> Form:
    """What `row` holds, by its columns or as `config.format` says. where: its place, for messages.

    Raises RowError for a row that cannot be used, ConfigError as `check`.
    """
    if config.columns:
        check(config)
        row = {**row, **{name: row[column] for name, column in config.columns.items() if column in row}}
    forms = _FORMATS[config.format]
    if config.columns:  # what the user names goes first
        forms = tuple(sorted(forms, key=lambda form: not any(name in config.columns for name in chain(*form[0]))))
    for needed, reader in forms:
        if all(any(row.get(name) is not None for name in names) for names in needed):
            try:
                return reader(row, where)
            except RecursionError:
                raise RowError(where, "nested too deeply", TOO_DEEP) from None
    raise _unknown(row, where, config)


def conversation(row: Mapping[str, Any], where: str) -> Conversation:
    """The conversation in `row`, by its turns, or its prompt with an answer or without. Raises RowError as `read`."""
    form = read(row, where, DataConfig(format="conversations"))
    assert isinstance(form, Conversation), "that format gives conversations alone"
    return form


def questions(talk: Conversation, where: str) -> list[list[Turn]]:
    """The turns that lead up to each answer of the assistant, without the answers: prompts to regenerate them.

    Raises RowError when the conversation asks nothing, and for images, which only training reads.
    """
    if talk.pictures:
        detail = (
            "a conversation with images, which training alone reads; expected text, whose answers can be written here"
        )
        raise RowError(where, "images", detail)
    groups: list[list[Turn]] = [[]]
    for turn in talk.turns:
        if turn["role"] != "assistant":
            groups[-1].append(turn)
        elif groups[-1]:
            groups.append([])
    asked = [group for group in groups if group]
    if not asked or any(group[-1]["role"] == "system" for group in asked):
        raise RowError(where, "no question", "no user turn to answer; expected a user or tool turn before each answer")
    return asked


def _of_turns(row: Mapping[str, Any], where: str) -> Conversation:
    column = _first(row, TURNS)
    return _conversation(row, where, read_turns(row[column], where, column))


def _answered(row: Mapping[str, Any], where: str) -> Conversation:
    """A prompt and an answer, each a string or turns; or an answer that is a whole conversation, as `chosen` may be.

    Answers in a prompt of turns are context.
    """
    asked, answered = _first(row, PROMPTS), _first(row, COMPLETIONS)
    answer = listed(row[answered])
    reply = read_turns(
        answer if isinstance(answer, list) else [{"role": "assistant", "content": answer}], where, answered
    )
    if reply.turns[0]["role"] != "assistant":
        return _conversation(row, where, reply)
    if not asked:
        detail = f"`{answered}` is an answer alone; expected `prompt` beside it, or a whole conversation in it"
        raise RowError(where, "no prompt", detail)
    return _conversation(row, where, _joined(_prompt(row, where, asked), reply))


def _asked(row: Mapping[str, Any], where: str) -> Conversation:
    """A prompt alone: nothing to learn, but to answer."""
    missing = next((name for name in COMPLETIONS if name in row), None)
    if missing is not None:
        detail = f"`{missing}` is null; expected an answer, or no such column where prompts are all there is"
        raise RowError(where, "no content", detail)
    return _conversation(row, where, _prompt(row, where, _first(row, PROMPTS)))


def _prompt(row: Mapping[str, Any], where: str, column: str) -> Turns:
    prompt = listed(row[column])
    if isinstance(prompt, list):
        given = read_turns(prompt, where, column)
        places = (place for place, turn in enumerate(given.turns) if turn["role"] == "assistant")
        return msgspec.structs.replace(given, context=frozenset(places))
    if column == "instruction" and isinstance(prompt, str) and row.get("input"):
        prompt = f"{prompt}\n{_string(row, 'input', where)}"
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        detail = f"`history` is {short(pairs)}; expected a list of pairs, each a question and its answer"
        raise RowError(where, "no turns", detail)
    said = [text for pair in pairs for text in pair] + [prompt]
    roles = cycle(("user", "assistant"))
    return read_turns([{"role": role, "content": text} for role, text in zip(roles, said, strict=False)], where, column)


def _joined(first: Turns, then: Turns) -> Turns:
    def moved(places: frozenset[int]) -> set[int]:
        return {place + len(first.turns) for place in places}

    return Turns(
        turns=first.turns + then.turns,
        cut=first.cut | moved(then.cut),
        context=first.context | moved(then.context),
        images=first.images + then.images,
    )


def _conversation(row: Mapping[str, Any], where: str, read: Turns) -> Conversation:
    """The turns with what stands beside them in `row`."""
    system = row.get("system") or row.get("system_prompt")
    if system and read.turns[0]["role"] != "system":
        read = _joined(read_turns([{"role": "system", "content": system}], where, "system"), read)
    turns, pictures = _illustrated(row, where, read)
    cut = read.cut | {len(read.turns) - 1} if row.get("finish_reason") == "length" else read.cut
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        detail = f"`chat_template_kwargs` is {short(options)}; expected an object of variables for the template"
        raise RowError(where, "no template variables", detail)
    return Conversation(
        turns=turns,
        tools=read_tools(row.get("tools") or row.get("functions"), where),
        cut=cut,
        context=read.context,
        options=without_nulls(options),
        pictures=pictures,
    )


def _illustrated(row: Mapping[str, Any], where: str, read: Turns) -> tuple[list[Turn], tuple[Picture, ...]]:
    """The turns, with a place for each image that stands beside them, and the images."""
    column = _first(row, IMAGES)
    beside = row[column] if column else []
    beside = beside if isinstance(beside, list) else [beside]
    if not beside and not read.images:
        return read.turns, ()
    if sum(turn["content"].count(PLACE) for turn in read.turns) != len(read.images):
        raise RowError(where, "an odd character", f"its text has {PLACE!r}, which stands for images here; take it out")
    turns, named = read.turns, list(read.images)
    if not named:  # <image> in a text, as of LLaVA
        turns = [
            {**turn, "content": turn["content"].replace("<image>", PLACE)} if turn["role"] != "assistant" else turn
            for turn in turns
        ]
        named = [None] * sum(turn["content"].count(PLACE) for turn in turns)
    if not named:  # as TRL has it: before what the user says first
        first = next((place for place, turn in enumerate(turns) if turn["role"] == "user"), 0)
        named = [None] * len(beside)
        turns = list(turns)
        turns[first] = {**turns[first], "content": PLACE * len(beside) + turns[first]["content"]}
    if len(beside) != named.count(None):
        detail = (
            f"{len(beside)} images beside the turns, and {named.count(None)} places for them; expected a part of type "
            f"image that names no file, or <image> in the text, for each, or for none"
        )
        raise RowError(where, "images without a place", detail)
    others, folder = iter(beside), str(row.get(FOLDER) or "")
    return turns, tuple(picture(next(others) if one is None else one, folder, where) for one in named)


def _text(row: Mapping[str, Any], where: str) -> Text:
    return Text(text=_string(row, "text", where))


def _continued(row: Mapping[str, Any], where: str) -> Text:
    """A prompt and its continuation as one text, for models that know no turns."""
    prompt = _string(row, _first(row, PROMPTS), where)
    answered = _first(row, COMPLETIONS)
    return Text(text=prompt + (_string(row, answered, where) if answered else ""), prompt=len(prompt))


def _string(row: Mapping[str, Any], column: str, where: str) -> str:
    found = row[column]
    if not isinstance(found, str):
        raise RowError(where, "no text", f"`{column}` is {short(found)}; expected a string")
    return found


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of the columns that `row` has, or the empty string."""
    return next((name for name in names if row.get(name) is not None), "")


Known = tuple[tuple[tuple[str, ...], ...], Callable[[Mapping[str, Any], str], Form]]
"""A form: groups of columns, of each of which a row has one, and what reads it."""
_TOKENS: Known = (("input_ids",),), read_tokens
_CHATS: tuple[Known, ...] = ((TURNS,), _of_turns), ((("chosen",),), _answered), ((PROMPTS, COMPLETIONS), _answered)
_TEXT: Known = (("text",),), _text
_PROMPT: Known = (PROMPTS,), _asked
_FORMATS: dict[str, tuple[Known, ...]] = {
    "auto": (_TOKENS, *_CHATS, _TEXT, _PROMPT),
    "tokens": (_TOKENS,),
    "conversations": (*_CHATS, _PROMPT),
    "text": (_TEXT, ((PROMPTS,), _continued)),
}
"""The forms of each `data.format`, in the order in which they are tried."""


def _unknown(row: Mapping[str, Any], where: str, config: DataConfig) -> RowError:
    columns = set(chain(*(names for needed, _ in _FORMATS[config.format] for names in needed)))
    files = {name: f" (the file's {column!r})" for name, column in config.columns.items()}
    empty = [f"`{name}`{files.get(name, '')} is null" for name in row if name in columns and row[name] is None]
    answer = _first(row, COMPLETIONS) if config.format != "tokens" else ""
    if answer:
        detail = (
            f"`{answer}`{files.get(answer, '')} is an answer alone; expected `prompt` beside it; data.columns says "
            f"which of {sorted(row)} is that"
        )
        return RowError(where, "no prompt", detail)
    if empty:
        return RowError(where, "nothing in it", f"{', '.join(empty)}; expected a value")
    wanted = (
        FORMS if config.format == "auto" else f"what data.format={config.format} reads: {', '.join(sorted(columns))}"
    )
    missing = [f"{name} to {column!r}" for name, column in config.columns.items() if column not in row]
    maps = f"maps {', '.join(missing)}, which it does not have" if missing else "maps other names to these"
    detail = f"has the columns {sorted(row)}; expected {wanted}; data.columns {maps}"
    return RowError(where, "unknown columns", detail)
