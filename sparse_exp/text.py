"""Text as people read it: tables in Markdown, numbers, the width of a console."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence


def between_marks(page: str, mark: str, text: str) -> str:
    """A page with ``text`` between ``<!-- MARK -->`` and ``<!-- /MARK -->``.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    first, last = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, start, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not start or not end or first in rest or last in after:
        raise ValueError(f"The page must hold {first} and {last} once each, in this order")
    return f"{before}{first}\n\n{text.strip()}\n\n{last}{after}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, align: bool = True) -> str:
    """A Markdown table, its columns of numbers right-aligned if ``align``; empty without rows."""
    cells = [[_cell(cell) for cell in row] for row in rows]
    if not cells:
        return ""
    marks = [
        "---:" if align and all(_is_number(row[i]) for row in cells) else "---" for i in range(len(header))
    ]
    lines = [[_cell(name) for name in header], marks, *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _is_number(text: str) -> bool:
    try:
        float(text.rstrip("%"))
    except ValueError:
        return text in ("", "-")
    return True


def _cell(text: str) -> str:
    return in_one_line(text).replace("|", "\\|")


def in_one_line(text: str) -> str:
    """The text with all white space folded to single spaces."""
    return " ".join(str(text).split())


def decimal(value: float | None, digits: int) -> str:
    """A number with that many decimals; a dash when there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as percentage with that many decimals; a dash when there is none."""
    return "-" if value is None else f"{value:.{digits}%}"


def console_width() -> int:
    """Columns that a printed table may take: those of the terminal, but from 80 to 110."""
    return min(110, max(80, shutil.get_terminal_size((100, 24)).columns))
