"""The hashes of a published model's files: written once, compared later."""

from __future__ import annotations

from pathlib import Path

from sparse_exp.files import sha256_of
from sparse_exp.sources.local import SUMS


def write_sums(directory: Path) -> None:
    """Write the sha256 of each file as ``SHA256SUMS``, which ``sha256sum -c`` reads."""
    lines = [f"{sha256_of(path)}  {path.relative_to(directory).as_posix()}\n" for path in files_of(directory)]
    (directory / SUMS).write_text("".join(lines), encoding="utf-8")


def changed_files(directory: Path) -> list[str]:
    """How the files of a model differ from what its ``SHA256SUMS`` says.

    Returns:
        A sentence for each file that is missing, changed or not listed. Empty where there is no such list.
    """
    try:
        lines = (directory / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [] if isinstance(error, FileNotFoundError) else [f"{SUMS} cannot be read"]
    promised = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    found = {path.relative_to(directory).as_posix(): path for path in files_of(directory)}
    problems = [f"{name} is missing" for name in sorted(promised.keys() - found.keys())]
    problems += [f"{name} is not in {SUMS}" for name in sorted(found.keys() - promised.keys())]
    changed = (name for name in found.keys() & promised.keys() if sha256_of(found[name]) != promised[name])
    return problems + [f"{name} was changed" for name in sorted(changed)]


def files_of(directory: Path) -> list[Path]:
    """All files of a model except the list of their hashes, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / SUMS)
