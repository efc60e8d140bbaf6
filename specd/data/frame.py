"""The frame a chat template puts around an answer, learnt from short conversations: its header and what may end it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from os.path import commonprefix
from typing import Any

import msgspec

from specd.data.faults import RowError
from specd.data.forms import Turn
from specd.data.marks import Marked
from specd.data.template import Renderer, Template
from specd.errors import DataError

QUESTION: Turn = {"role": "user", "content": "Why?"}
ANSWER: Turn = {"role": "assistant", "content": "Because."}
_CALL: dict[str, Any] = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
_CALLING: Turn = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT: Turn = {"role": "tool", "name": "look", "tool_call_id": "call00001", "content": "Seen."}
_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "description": "What."}}},
    },
}


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """generation: the generation prompt; empty if the template has none of its own (Llama 2's ends the question).

    header: what begins every answer, with thoughts or without. begins: finds it, and what begins one behind a tool's
    results where that is another. leads: what the template writes before an answer of content alone, the longest
    first. rest: what else belongs to the header of such an answer, because the generation prompt stops within it
    (gpt-oss). end: finds a token that can end an answer. closing: what follows the content of a last answer, its end
    token included. tokens: added tokens that the template writes. structure: finds one of them, or a special token:
    what a plain document does not have.
    """

    generation: str
    header: str
    begins: re.Pattern[str]
    leads: tuple[str, ...]
    rest: str
    end: re.Pattern[str]
    closing: str
    tokens: frozenset[str]
    structure: re.Pattern[str]


def learn(template: Template, added: Mapping[str, bool], ends: Iterable[str]) -> Frame:
    """The frame of `template`.

    added: the tokenizer's added tokens, and whether they are special. ends: tokens that are known to end a text.
    Raises DataError for a template that refuses a question and an answer, or does not write the answer.
    """
    known = sorted((token for token in added if token.strip()), key=len, reverse=True)
    asked, opened, prompt, last, early = _shown(template)
    header, generation = prompt[1], opened[shared(opened, [asked], known) :]
    (_, lead, tail), (_, lead_early, after, _) = last, early
    rest = _rest(header, generation, lead, lead_early)
    if generation:
        closed = len(header) - len(generation)
        leads = [lead[closed:], lead_early[closed:]]
        begin = generation[: shared(generation, leads, known)]
    else:
        begin = rest or header.lstrip()
        leads = [begin]
    template.json_arguments = _reads_json(template)
    found = set(ends) | _ends(tail, after, known) | _ends_of_calls(template, tail, known)
    first = any_of(found).search(tail)
    written = {token for token in known if any(token in text for text in (opened, *last, *early))}
    return Frame(
        generation=generation,
        header=begin,
        begins=re.compile(
            "|".join(filter(None, (re.escape(begin), _behind_results(template, begin, known)))) or r"(?!)"
        ),
        leads=tuple(sorted((text for text in dict.fromkeys(leads) if text.strip()), key=len, reverse=True)),
        rest=rest,
        end=any_of(found),
        closing=tail[: first.end()] if first else "",
        tokens=frozenset(written),
        structure=any_of(written | {token for token in known if added[token]}),
    )


def _shown(template: Template) -> tuple[str, str, list[str], list[str], list[str]]:
    """A question alone, and opened for an answer; the latter, an answer and a question behind it, as `_around`.

    Contents are lists of parts from now on if that is what `template` writes. Raises DataError if it writes neither.
    """
    fault = "it does not write a question and an assistant's answer"
    for parts in (False, True):
        template.parts = parts
        row = template.row("a question and an answer")
        try:
            asked, opened = row.render([QUESTION]), row.render([QUESTION], open_answer=True)
            prompt = _around(row, [QUESTION], open_answer=True)
            last, early = _around(row, [QUESTION, ANSWER]), _around(row, [QUESTION, ANSWER, QUESTION])
        except RowError as error:
            fault = fault if parts else str(error)
            continue
        if len(prompt) == 2 and len(last) == 3 and len(early) == 4:
            return asked, opened, prompt, last, early
    raise DataError(f"the chat template cannot be used: {fault}; use `text` or `input_ids` data")


def _rest(header: str, generation: str, lead: str, lead_early: str) -> str:
    """What stands behind the generation prompt in every answer and belongs to its header; "" if the prompt is whole.

    It is not where there is none, or where it ends with the role's name.
    """
    if not (lead.startswith(header) and lead_early.startswith(header)):
        return ""
    if generation and not generation[-1].isalnum():
        return ""
    same = commonprefix([lead[len(header) :], lead_early[len(header) :]])  # noqa: RUF071 - of texts, not of paths
    if not same.strip():
        return ""
    return same if generation else same.rstrip(" ")


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Finds any of `tokens`, the longest where several begin at one place."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _around(row: Renderer, turns: list[Turn], *, open_answer: bool = False) -> list[str]:
    """The texts before, between and behind the contents of `turns`; fewer where the template leaves contents out."""
    marked = Marked(turns, "")
    text, marks = marked.read(row.render(marked.turns, open_answer=open_answer))
    result, at = [], 0
    for turn in range(len(turns)):
        own = [mark.at for mark in marks if mark.turn == turn and not mark.again]
        if len(own) == 2:
            result.append(text[at : own[0]])
            at = own[1]
    return [*result, text[at:]]


def shared(text: str, others: list[str], known: Iterable[str]) -> int:
    """Length of what `text` and `others` have in common at their beginning, up to whole added tokens."""
    length = len(commonprefix([text, *others]))  # noqa: RUF071 - of texts, not of paths
    for token in known:
        at = text.find(token)
        while 0 <= at < length:
            if length < at + len(token):
                return at
            at = text.find(token, at + len(token))
    return length


def _first(text: str, known: list[str]) -> tuple[int, str] | None:
    """The first added token in `text`, and where."""
    found = [(at, -len(token), token) for token in known if (at := text.find(token)) >= 0]
    return (min(found)[0], min(found)[2]) if found else None


def _ends(tail: str, after: str, known: list[str]) -> set[str]:
    """What ends an answer, from what stands behind one that is the last turn, and before a question.

    That is an added token, else a text. Without any behind a last answer, the token of the next turn's role is what
    the target writes at its end.
    """
    ends = set()
    first = _first(tail, known)
    if first:
        at, token = first
        # Tokens that close the content and then the turn: <|END_RESPONSE|><|END_OF_TURN_TOKEN|>.
        while after.startswith(tail[: at + len(token)]):
            following = _first(tail[at + len(token) :], known)
            if following is None or following[0] != 0 or not after.startswith(tail[: at + len(token + following[1])]):
                break
            at, token = at + len(token), following[1]
        ends.add(token)
        if after.startswith(tail[:at]) and after.startswith(token, at):
            return ends
    elif tail.strip() and after.startswith(tail.rstrip()):
        return {tail.strip()}
    before = _first(after, known)
    return ends | {before[1]} if before else ends


def _reads_json(template: Template) -> bool:
    """Whether `template` writes the arguments of a call when they are JSON, and not when they are an object."""
    arguments = _CALL["function"]["arguments"]
    shown = []
    for template.json_arguments in (False, True):
        try:
            text = template.row("a call", [_TOOL]).render([QUESTION, _CALLING, _RESULT])
            shown.append(str(arguments) not in text)
        except RowError:
            shown.append(False)
    return shown == [False, True]


def _ends_of_calls(template: Template, tail: str, known: list[str]) -> set[str]:
    """Tokens that end an answer which calls a tool. tail: what stands behind an answer that is the last turn."""
    try:
        marked = Marked([QUESTION, _CALLING, _RESULT], "")
        row = template.row("a call", [_TOOL])
        called, marks = marked.read(row.render(marked.turns[:2]))
        calls = [mark.at for mark in marks if mark.turn == 1]
        if calls and _first(tail, known):
            closing = called[calls[-1] :]
            tokens = [(closing.rfind(token), token) for token in known if token in closing]
            return {max(tokens)[1]} if tokens else set()
        told, marks = marked.read(row.render(marked.turns))
        results = [mark.at for mark in marks if mark.turn == 2]
        if calls and results and told.startswith(called):
            first = _first(told[len(called) : results[0]], known)
            return {first[1]} if first else set()
    except RowError:
        pass
    return set()


def _behind_results(template: Template, header: str, known: list[str]) -> str:
    """Pattern of the token that ends a tool's results where an answer follows without `header`; else ""."""
    try:
        row = template.row("a result", [_TOOL])
        marked = Marked([QUESTION, _CALLING, _RESULT], "")
        opened, marks = marked.read(row.render(marked.turns, open_answer=True))
    except RowError:
        return ""
    calls, results = ([mark.at for mark in marks if mark.turn == turn and not mark.again] for turn in (1, 2))
    if not calls or not results or header in opened[results[-1] :]:
        return ""
    tail, between = opened[results[-1] :], opened[calls[-1] : results[0]]
    ends = [(tail.rfind(token), token) for token in known if token in tail]
    # Another result may follow, and no answer.
    others = any_of(token for token in known if token in between).pattern
    return rf"{re.escape(max(ends)[1])}(?!\s*(?:{others}))" if ends else ""
