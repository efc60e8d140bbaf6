"""A page of rows for people: labels in colour, or in brackets where there is none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from specd.data.faults import RowError
    from specd.data.inspection import Seen

LABEL, CONTEXT, CUT = "bold green", "dim", "strike dim red"
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""What a terminal would obey in place of showing it."""


class Page:
    """Writes rows to the standard output, each under a line of its own, and at last what the marks mean."""

    def __init__(self, tokenizer: Any, max_length: int, *, ids: bool = False) -> None:
        """max_length: tokens that training reads of a row. ids: a line for each token in place of the text."""
        self.console = Console(highlight=False, markup=False, emoji=False)
        self._tokenizer, self._max_length, self._ids = tokenizer, max_length, ids
        self._colour = self.console.color_system is not None and not self.console.no_color
        plain = not self.console.encoding.startswith("utf")
        self._open, self._close, self._scissors = ("[[", "]]", "<cut>") if plain else ("⟦", "⟧", "✂")
        self._line = "-" if plain else "─"
        self._most_cut = 0
        self._seen = self._escaped = False

    def row(self, number: int, seen: Seen, method: str, needed: int) -> None:
        """A row, of which training reads the first `max_length` tokens. needed: by `method`, so many labels on end."""
        from specd.data.dataset import trainable

        self._seen = True
        self._head(number, seen.where)
        kept = seen.loss_mask[: self._max_length]
        cut = seen.tokens.size - kept.size
        self._most_cut = max(self._most_cut, cut)
        self._print(self._lines(seen) if self._ids else self._marked(seen))
        self.console.rule(characters=self._line, style=CONTEXT)
        counts = Text(f"{kept.size} tokens, {int(kept.sum())} labels")
        if cut:
            counts.append(f", {cut} tokens cut", CUT if self._colour else "")
        self._print(counts)
        if seen.dropped:
            answers = "1 answer" if seen.dropped == 1 else f"{seen.dropped} answers"
            self._print(Text(f"{answers} without the thoughts: the chat template leaves them out of the history"))
        if not trainable(kept, needed):
            reason = Text("left out of training:", "bold red")
            self._print(reason.append(f" {method} needs {needed} labels in a row", "not bold default"))

    def fault(self, number: int, error: RowError) -> None:
        """A row that cannot be used."""
        self._head(number, error.where)
        self._print(Text("cannot be used: ", "bold red").append(self._visible(str(error)), "not bold default"))

    def legend(self) -> None:
        """What the marks of the rows above mean."""
        if not self._seen:
            return
        brackets = not (self._colour or self._ids)
        label = f"{self._open}label{self._close}" if brackets else "label"
        parts = Text.assemble((label, LABEL), " (the target writes it), ", ("context", CONTEXT), " (given)")
        if self._most_cut:
            parts.append(", ").append(self._scissors if brackets else "cut", CUT if self._colour else "")
            parts.append(f" (beyond data.max_length={self._max_length})")
        if self._escaped:
            parts.append(f", \\{self._open} \\{self._close} (they stand in the text)")
        self._print(parts)

    def _head(self, number: int, where: str) -> None:
        title = Text(self._visible(f"row {number}, {where}"))
        self.console.rule(title, characters=self._line, align="left", style=CONTEXT)

    def _print(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True)

    def _marked(self, seen: Seen) -> Text:
        """The text of a row, its labels marked."""
        text = Text()
        for begin, end, style in self._runs(seen):
            piece = self._visible(self._decode(seen, begin, end))
            if self._colour:
                text.append(piece, style)
                continue
            for bracket in (self._open, self._close):
                self._escaped |= bracket in piece
                piece = piece.replace(bracket, "\\" + bracket)
            if begin == self._max_length:
                text.append(self._scissors)
            text.append(f"{self._open}{piece}{self._close}" if style is LABEL else piece)
        return text

    def _lines(self, seen: Seen) -> Text:
        """A line for each token: its place from 0, its id, whether it is a label, its text."""
        text = Text(f"{'place':>6} {'id':>8}       text", CONTEXT)
        for begin, end, style in self._runs(seen):
            mark = {LABEL: "label", CUT: "cut"}.get(style, "")
            for place in range(begin, end):
                piece = repr(self._decode(seen, place, place + 1))
                line = f"\n{place:>6} {seen.tokens[place]:>8} {mark:<5} {piece}"
                text.append(self._visible(line), style if self._colour else "")
        return text

    def _runs(self, seen: Seen) -> Iterator[tuple[int, int, str]]:
        """Tokens [begin, end) that are alike, and their style."""
        begin, size = 0, seen.tokens.size
        for end in range(1, size + 1):
            if end in (size, self._max_length) or seen.loss_mask[end] != seen.loss_mask[begin]:
                yield begin, end, CUT if begin >= self._max_length else LABEL if seen.loss_mask[begin] else CONTEXT
                begin = end

    def _decode(self, seen: Seen, begin: int, end: int) -> str:
        """The text of tokens [begin, end) at their place: some tokenizers drop a space where a text begins."""
        before, whole = (
            str(self._tokenizer.decode(seen.tokens[at:stop].tolist(), clean_up_tokenization_spaces=False))
            for at, stop in ((begin - 1 if begin else 0, begin), (begin - 1 if begin else 0, end))
        )
        if whole.startswith(before):
            return whole[len(before) :]
        return str(self._tokenizer.decode(seen.tokens[begin:end].tolist(), clean_up_tokenization_spaces=False))

    def _visible(self, text: str) -> str:
        return visible(text, self.console.encoding)


def visible(text: str, encoding: str) -> str:
    """`text` with escapes in place of what would steer the terminal, or what the output's encoding lacks."""
    shown = UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)
