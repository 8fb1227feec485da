"""Tables of text, written as plain text, Markdown, LaTeX or HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from reprlib import Repr

LATEX = {c: "\\" + c for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
}
MOST_ROWS, MOST_CHARACTERS = 20, 60  # of a table and of a cell in a notebook
STYLE = """
.sksoup { overflow-x: auto; } .sksoup p { margin: .3em 0; }
.sksoup table { border-collapse: collapse; font-size: .9em; margin: .4em 0; }
.sksoup th, .sksoup td { padding: .2em .6em; border: 0; text-align: left; white-space: nowrap; }
.sksoup tr { border-bottom: 1px solid #8886; background: none; }
.sksoup .number { text-align: right; font-variant-numeric: tabular-nums; }
"""
PIPE = re.compile(r"(?<!\\)((?:\\\\)*)\|")  # one without a backslash that escapes it


@dataclass(frozen=True)
class Table:
    """A header and rows of cells; columns are right-aligned, except those in ``left``."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Collection[int] = (0,)

    def to_text(self, rule: bool = False) -> str:
        """Padded columns, two spaces apart; ``rule`` draws a line below the header."""
        table = [[printable(cell) for cell in row] for row in [self.header, *self.rows]]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(self._padded(row, widths)).rstrip() for row in table]
        if rule:
            lines.insert(1, "-" * len(lines[0]))
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """A table of GitHub's Markdown; cells may hold Markdown, bare pipes in them are escaped."""
        rows = [[PIPE.sub(r"\1\|", printable(" ".join(cell.split()))) for cell in row]
                for row in [self.header, *self.rows]]  # fmt: skip
        align = ["---" if k in self.left else "---:" for k in range(len(self.header))]
        return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], align, *rows[1:]])

    def to_latex(self) -> str:
        """A ``tabular`` for the package booktabs."""
        lines = [" & ".join(map(_latex, row)) + r" \\" for row in [self.header, *self.rows]]
        columns = "".join("l" if k in self.left else "r" for k in range(len(self.header)))
        return "\n".join(
            [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:],
             r"\bottomrule", r"\end{tabular}"]
        )  # fmt: skip

    def to_html(self) -> str:
        """A ``table``; the cells of right-aligned columns have the class ``number``."""
        body = "".join(self._html_row("td", row) for row in self.rows)
        return f"<table>{self._html_row('th', self.header)}{body}</table>"

    def without_empty(self) -> Table:
        """The table without the columns that have nothing but "-" or nothing at all in them."""
        full = [
            k for k in range(len(self.header)) if any(row[k] not in ("-", "") for row in self.rows)
        ]
        rows = [[row[k] for k in full] for row in self.rows]
        left = [new for new, k in enumerate(full) if k in self.left]
        return Table([self.header[k] for k in full], rows, left)

    def _padded(self, row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
        for k, (cell, width) in enumerate(zip(row, widths, strict=True)):
            yield cell.ljust(width) if k in self.left else cell.rjust(width)

    def _html_row(self, tag: str, row: Sequence[str]) -> str:
        cells = (
            f"<{tag}{'' if k in self.left else ' class=number'}>{html.escape(cell)}</{tag}>"
            for k, cell in enumerate(map(printable, row))
        )
        return f"<tr>{''.join(cells)}</tr>"


def notebook_html(heading: str, table: Table, notes: Sequence[str] = ()) -> str:
    """What a notebook shows: a heading, the first rows of a table, notes; bounded and escaped."""
    rows = [[shortened(cell) for cell in row] for row in table.rows[:MOST_ROWS]]
    rest = len(table.rows) - len(rows)
    notes = [f"… and {rest:,} more", *notes] if rest else notes
    shown = Table([shortened(title) for title in table.header], rows, table.left)
    below = "".join(f"<p>{html.escape(shortened(note, 1000))}</p>" for note in notes)
    return (
        f"<div class='sksoup'><style>{STYLE}</style>"
        f"<p><b>{html.escape(shortened(heading, 200))}</b></p>{shown.to_html()}{below}</div>"
    )


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """Printable text of at most so many characters; the middle of a longer one is left out."""
    if len(text) > most:
        text = f"{text[: most - most // 3 - 1]}…{text[-(most // 3) :]}"
    return printable(text)


_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 120


def short(value: object) -> str:
    """The repr of a value, shortened for an error; values may be nested to any depth."""
    return _short.repr(value)


def printable(text: str) -> str:
    """Text with escapes for what a terminal obeys or does not show.

    Control characters, those that turn the direction of writing, halves of surrogates.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _latex(text: str) -> str:
    """Printable text, with escapes for the characters that LaTeX takes for commands."""
    return "".join(LATEX.get(character, character) for character in printable(text))
