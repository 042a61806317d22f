"""A comparison as files."""

from __future__ import annotations

from pathlib import Path

from sparse_exp.compare.comparison import Comparison
from sparse_exp.compare.table import as_csv, as_markdown
from sparse_exp.files import write_text


def write_files(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``compare.csv``, ``compare.md``, ``compare.png`` and ``compare.html``.

    Args:
        comparison: pictures are left out where no run has both metrics.
        folder: made if need be.

    Returns:
        The files.

    Raises:
        OSError: the folder cannot be written to.
    """
    from sparse_exp.compare.pictures import draw

    return [
        write_text(folder / "compare.csv", as_csv(comparison)),
        write_text(folder / "compare.md", as_markdown(comparison)),
        *draw(comparison, folder),
    ]
