"""Write a comparison into files."""

from __future__ import annotations

from pathlib import Path

from sparse_exp.compare.comparison import Comparison
from sparse_exp.compare.pictures import draw
from sparse_exp.compare.table import as_csv, as_markdown
from sparse_exp.files import write_text


def write_files(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``compare.csv``, ``compare.md``, ``compare.png`` and ``compare.html``.

    Args:
        comparison: where no finished run has both metrics, there are no pictures.
        folder: where the files go; made if need be.

    Returns:
        The files that were written.

    Raises:
        OSError: the folder cannot be written to.
    """
    return [
        write_text(folder / "compare.csv", as_csv(comparison)),
        write_text(folder / "compare.md", as_markdown(comparison)),
        *draw(comparison, folder),
    ]
