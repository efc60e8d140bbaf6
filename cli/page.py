"""A page of rows for people: labels in colour, or in brackets where there is none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from specd.config.settings import DataConfig
    from specd.data.faults import RowError
    from specd.data.samples import Coded

LABEL, CONTEXT, CUT = "bold green", "dim", "strike dim red"
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""What a terminal would obey in place of showing it."""


class Page:
    """Writes rows to the standard output, each under a line of its own, and at last what the marks mean."""

    def __init__(self, tokenizer: Any, config: DataConfig, method: str, needed: int, *, ids: bool = False) -> None:
        """needed: labels on end that `method` asks of a sample. ids: a line for each token in place of the text."""
        console = Console(highlight=False, markup=False, emoji=False)
        self._colour = console.color_system is not None and not console.no_color
        # Without colour nothing is emphasised either: the brackets say it.
        bare = Console(highlight=False, markup=False, emoji=False, color_system=None)
        self.console = console if self._colour else bare
        self._tokenizer, self._config, self._method, self._needed, self._ids = tokenizer, config, method, needed, ids
        plain = not self.console.encoding.startswith("utf")
        self._open, self._close, self._scissors = ("[[", "]]", "<cut>") if plain else ("⟦", "⟧", "✂")
        self._line = "-" if plain else "─"
        self._seen = self._cut = self._escaped = False

    def row(self, number: int, where: str, coded: Coded) -> None:
        """A row, with what of it training reads."""
        from specd.data.samples import pieces, trainable

        longest, size = self._config.max_length, coded.tokens.size
        split = coded.document and self._config.long == "split"
        kept = size if split else min(size, longest)
        self._seen, self._cut = True, self._cut or kept < size
        self._head(number, where)
        self.console.print(self._lines(coded, kept) if self._ids else self._marked(coded, kept), soft_wrap=True)
        self.console.rule(characters=self._line, style=CONTEXT)
        counts = Text(f"{kept} tokens, {int(coded.loss_mask[:kept].sum())} labels")
        if kept < size:
            counts.append(f", {size - kept} tokens cut", CUT)
        if split and (samples := len(pieces(size, longest, self._needed))) > 1:
            counts.append(f", split into {samples} samples")
        self._say(counts)
        for one, count in zip(coded.pictures, coded.counts, strict=True):
            self._say(Text(self._visible(f"image {one.name}: {count} tokens")))
        if coded.dropped:
            answers = "1 answer" if coded.dropped == 1 else f"{coded.dropped} answers"
            self._say(Text(f"the chat template leaves out a part of {answers}, as thoughts of earlier turns"))
        if not trainable(coded.loss_mask[:kept], self._needed):
            reason = f" {self._method} needs {self._needed} labels in a row"
            self._say(Text.assemble(("left out of training:", "bold red"), reason))

    def fault(self, number: int, error: RowError) -> None:
        """A row that cannot be used."""
        self._head(number, error.where)
        self._say(Text.assemble(("cannot be used: ", "bold red"), self._visible(str(error))))

    def legend(self) -> None:
        """What the marks of the rows above mean."""
        if not self._seen:
            return
        brackets = not (self._colour or self._ids)
        label = f"{self._open}label{self._close}" if brackets else "label"
        parts = Text.assemble((label, LABEL), " (the target writes it), ", ("context", CONTEXT), " (given)")
        if self._cut:
            parts.append(", ").append(self._scissors if brackets else "cut", CUT)
            parts.append(f" (beyond data.max_length={self._config.max_length})")
        if self._escaped:
            parts.append(f", \\{self._open} \\{self._close} (they stand in the text)")
        self._say(parts)

    def _head(self, number: int, where: str) -> None:
        title = Text(self._visible(f"row {number}, {where}"))
        self.console.rule(title, characters=self._line, align="left", style=CONTEXT)

    def _say(self, text: Text) -> None:
        """A line for people, which is folded on a terminal alone."""
        self.console.print(text, soft_wrap=not self.console.is_terminal)

    def _marked(self, coded: Coded, kept: int) -> Text:
        """The text of a row, its labels marked."""
        text = Text()
        for begin, end, style in _runs(coded, kept):
            piece = self._visible(self._decode(coded, begin, end))
            if self._colour:
                text.append(piece, style)
                continue
            for bracket in (self._open, self._close):
                self._escaped |= bracket in piece
                piece = piece.replace(bracket, "\\" + bracket)
            if begin == kept:
                text.append(self._scissors)
            text.append(f"{self._open}{piece}{self._close}" if style == LABEL else piece)
        return text

    def _lines(self, coded: Coded, kept: int) -> Text:
        """A line for each token: its place from 0, its id, whether it is a label, its text.

        A part of a character has no text: the vocabulary's name stands for it.
        """
        text = Text().append(f"{'place':>6} {'id':>8}       text", CONTEXT)
        for begin, end, style in _runs(coded, kept):
            mark = {LABEL: "label", CUT: "cut"}.get(style, "")
            for place in range(begin, end):
                piece = repr(self._decode(coded, place, place + 1))
                if "\N{REPLACEMENT CHARACTER}" in piece:
                    piece = str(self._tokenizer.convert_ids_to_tokens(int(coded.tokens[place])))
                line = f"{place:>6} {coded.tokens[place]:>8} {mark:<5} {piece}"
                text.append("\n").append(self._visible(line), style)
        return text

    def _decode(self, coded: Coded, begin: int, end: int) -> str:
        """The text of tokens [begin, end) at their place: some tokenizers drop a space where a text begins."""
        start = max(begin - 1, 0)
        before, whole = (
            str(self._tokenizer.decode(coded.tokens[start:stop].tolist(), clean_up_tokenization_spaces=False))
            for stop in (begin, end)
        )
        if whole.startswith(before):
            return whole[len(before) :]
        return str(self._tokenizer.decode(coded.tokens[begin:end].tolist(), clean_up_tokenization_spaces=False))

    def _visible(self, text: str) -> str:
        return visible(text, self.console.encoding)


def _runs(coded: Coded, kept: int) -> Iterator[tuple[int, int, str]]:
    """Tokens [begin, end) that are alike, and their style."""
    begin, size = 0, coded.tokens.size
    for end in range(1, size + 1):
        if end in (size, kept) or coded.loss_mask[end] != coded.loss_mask[begin]:
            yield begin, end, CUT if begin >= kept else LABEL if coded.loss_mask[begin] else CONTEXT
            begin = end


def visible(text: str, encoding: str) -> str:
    """`text` with escapes in place of what would steer the terminal, or what the output's encoding lacks."""
    shown = UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)
