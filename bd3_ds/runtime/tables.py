"""Tables by `tabulate`: aligned columns for the console, Markdown, and labelled paragraphs."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from tabulate import tabulate

WIDTH = 100  # columns of console output


def console_table(header: Sequence[Any], rows: Iterable[Sequence[Any]], left: Collection[int] = (0,)) -> str:
    """The header and the rows as aligned columns, two spaces apart; the columns numbered in `left` to the left.

    Cells are shown as `str` makes them and keep leading spaces; None is empty. An empty header has no line.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in ([header] if header else []) + list(rows)]
    if not cells:
        return ""
    alignment = ["left" if column in left else "right" for column in range(len(cells[0]))]
    return _trimmed(
        tabulate(cells, tablefmt="plain", disable_numparse=True, colalign=alignment, preserve_whitespace=True)
    )


def markdown_table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table that is aligned in its source as well; columns that hold numbers only to the right."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    names = [str(name).replace("|", "\\|") for name in header]
    alignment = [
        "right" if cells and all(_is_number(row[column]) for row in cells) else "left" for column in range(len(names))
    ]
    return str(tabulate(cells, headers=names, tablefmt="pipe", disable_numparse=True, colalign=alignment))


def labelled(rows: Iterable[tuple[str, str]], width: int = WIDTH) -> str:
    """Labels in a column, texts beside them, wrapped at `width`; lines of a text that has several stay as they are."""
    rows = list(rows)
    beside = width - 2 - max((len(label) for label, _ in rows), default=0) - 2
    cells = [(label, text if "\n" in text else "\n".join(wrapped(text, beside))) for label, text in rows]
    table = tabulate(cells, tablefmt="plain", disable_numparse=True, preserve_whitespace=True)
    return textwrap.indent(_trimmed(table), "  ")


def wrapped(text: str, width: int = WIDTH, further: str = "") -> list[str]:
    """Lines of at most `width` columns; those after the first begin with `further`. Paths and words stay whole."""
    return textwrap.wrap(text, width, subsequent_indent=further, break_on_hyphens=False, break_long_words=False)


def _trimmed(table: str) -> str:
    return "\n".join(line.rstrip() for line in table.splitlines())


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(" ± ", "").replace(".", "").replace("no bound", "0").isdigit()
