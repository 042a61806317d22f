"""Answer what to ship on this CPU, with ``sweep=ship``, and put the table and picture into a page.

    python benchmarks/ship.py --write docs/results.md                       # trees, 320 px
    python benchmarks/ship.py --write docs/results.md hardware=all          # all engines

A sweep that was stopped goes on. Words of the form KEY=VALUE are overrides of the sweep.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from series import parse

from sparse_exp.command import Parser, run_command
from sparse_exp.compare.shipping import PAGE, PICTURE
from sparse_exp.errors import StageFailed
from sparse_exp.hardware import host_facts
from sparse_exp.text import between_marks

_PICTURE = Path("images") / PICTURE  # relative to the page


def main() -> int:
    """Make the sweep, then print its page or put it into another."""
    options, overrides = _options()
    words = ["-m", "sweep=ship", "sweep.name=ship", f"paths.output={options.out}", "tracker=none", *overrides]
    start = time.monotonic()
    if subprocess.run([sys.executable, "-m", "sparse_exp", *words], check=False).returncode:
        raise StageFailed("The sweep failed; its last line says why. The same command goes on.")
    minutes = (time.monotonic() - start) / 60
    folder = options.out / "sweeps" / "ship" / "compare"
    title, _, body = (folder / PAGE).read_text(encoding="utf-8").partition("\n")
    assert title.startswith("# "), title
    facts = host_facts()
    command = " ".join(["python -m sparse_exp -m sweep=ship", *overrides])
    where = f"{facts.usable_cores} cores of {facts.cpu} ({', '.join(facts.isa)})"
    took = f"`{command}` on {where} took {minutes:.0f} minutes."
    text = f"{took}\n\n{body.strip().replace(f']({PICTURE})', f']({_PICTURE})')}\n"
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        options.write.write_text(between_marks(page, "ship", text), encoding="utf-8")
        shutil.copyfile(folder / PICTURE, options.write.parent / _PICTURE)
    else:
        sys.stdout.write(text)
    return 0


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder of the sweep")
    parser.add_argument("--write", type=Path, help="page to put the answer into, between its marks ship")
    return parse(parser)


if __name__ == "__main__":
    run_command(main)
