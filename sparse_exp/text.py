"""Text as people read it: tables in Markdown and on the console, numbers, the width of a console."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


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


def markdown_table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], *, right: Container[int] | None = None
) -> str:
    """A Markdown table; empty without rows.

    Args:
        titles: of the columns.
        rows: the cells of each. White space becomes single spaces, and ``|`` is escaped; other marks of
            Markdown keep their meaning.
        right: columns to align to the right, from 0; None: those of numbers.
    """
    cells = [[_cell(cell) for cell in row] for row in rows]
    if not cells:
        return ""
    if right is None:
        right = [column for column in range(len(titles)) if all(_is_number(row[column]) for row in cells)]
    marks = ["---:" if column in right else "---" for column in range(len(titles))]
    lines = [[_cell(title) for title in titles], marks, *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def console_table(
    titles: Sequence[str],
    rows: Iterable[Sequence[str]] = (),
    *,
    right: Container[int] = (),
    styles: Sequence[str] | None = None,
) -> Table:
    """A table for a rich console: one line below the titles, and long cells folded.

    Args:
        titles: of the columns.
        rows: the cells of each. They are shown as they are: brackets are no markup.
        right: columns to align to the right, from 0.
        styles: rich's style of each row; None: plain.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, title in enumerate(titles):
        table.add_column(escape(title), justify="right" if column in right else "left", overflow="fold")
    for index, row in enumerate(rows):
        table.add_row(*map(escape, row), style=styles[index] if styles else None)
    return table


def plain_text(*parts: RenderableType, width: int) -> str:
    """What a rich console of ``width`` columns prints of some parts, without colours.

    No line ends in blanks.
    """
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    for part in parts:
        console.print(part)
    printed: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in printed.splitlines())


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


def whole_text(text: str) -> str:
    """A text that can be written as UTF-8: halves of letters (surrogates) are joined, lone ones replaced.

    JSON spells letters beyond 16 bits as two halves, which a reader of another format leaves apart.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def in_picture(text: str, most: int = 40) -> str:
    """A text as a label in a picture: in one line, only what can be printed, at most ``most`` letters."""
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in in_one_line(text))
    return shown if len(shown) <= most else f"{shown[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def in_markdown(text: str) -> str:
    """A text in one line, without marks of Markdown or HTML; of cells' ``|`` `markdown_table` takes care."""
    shown = "".join(letter if letter.isprintable() else "\ufffd" for letter in in_one_line(text))
    return re.sub(r"([\\`*_{}\[\]<>#~$&!])", r"\\\1", shown)


def decimal(value: float | None, digits: int) -> str:
    """A number with that many decimals; a dash when there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as percentage with that many decimals; a dash when there is none."""
    return "-" if value is None else f"{value:.{digits}%}"


def console_width() -> int:
    """Columns that a printed table may take: those of the terminal, but from 80 to 110."""
    return min(110, max(80, shutil.get_terminal_size((100, 24)).columns))
