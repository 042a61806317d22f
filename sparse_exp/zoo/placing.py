"""Put a model into the local zoo, whole or not at all.

A model is built in ``<zoo>/.publishing`` under one lock for the whole zoo, so that the next publish clears
what a killed one left. Permissions follow the umask: a zoo that a team shares wants a umask that lets the
group write.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from sparse_exp.errors import ConfigError
from sparse_exp.files import landing_directory, replaced_by
from sparse_exp.locks import exclusive
from sparse_exp.sources.local import (
    METADATA,
    Published,
    directory_of,
    is_free,
    read_metadata,
    require_free,
    stub_of,
)
from sparse_exp.zoo.checksums import write_sums

_LOCK, _PART = ".lock", ".publishing"
_WAIT_S = 600.0

Fill = Callable[[str, Path], None]


def put(
    stub: str,
    zoo: Path,
    fill: Fill,
    *,
    force: bool = False,
    numbered: bool = False,
    owner: str | None = None,
) -> Published:
    """Publish a model.

    Args:
        stub: where it belongs; of either grammar.
        zoo: see `sparse_exp.sources.local.zoo_directory`; made where it is not there.
        fill: is given the stub and an empty directory, and writes all files of the model into it,
            ``model.json`` among them.
        force: replace a model that is there, whosever it is. Readers see the old one or the new one,
            whole, see `sparse_exp.files.landing_directory`.
        numbered: where the stub is taken, add the next free number to its tag.
        owner: key of the run whose own models are replaced; see `sparse_exp.sources.local.is_free`.

    Raises:
        ConfigError: the stub is malformed or taken, another process publishes for minutes, or the zoo
            cannot be written. The zoo is then as it was.
    """
    directory_of(stub, zoo)
    try:
        with exclusive(zoo / _LOCK, f"The zoo {zoo} is being written", at_most=_WAIT_S):
            _clear(zoo)
            stub = stub_of(directory_of(stub, zoo), zoo)
            if numbered and not force:
                stub = _free(stub, zoo, owner)
            if not force:
                require_free(stub, zoo, owner)
            target = directory_of(stub, zoo)
            with landing_directory(target, part=zoo / _PART) as folder:
                fill(stub, folder)
                if not (folder / METADATA).is_file():
                    raise ValueError(f"no {METADATA} was written")
                write_sums(folder)
    except OSError as error:
        do = "Free or allow the space, or choose another zoo with paths.zoo=PATH (--zoo PATH)."
        raise ConfigError(f"Cannot publish in {zoo}: {error.strerror or error}. {do}") from error
    return Published(stub, target, read_metadata(target))


def _clear(zoo: Path) -> None:
    """Remove what a killed process was building, and what it replaced.

    A model that it had moved away, without putting the new one there yet, goes back to its place.
    """
    part = zoo / _PART
    old = replaced_by(part)
    stub = read_metadata(old).get("stub")
    if stub and not directory_of(stub, zoo).exists():
        old.replace(directory_of(stub, zoo))
    for folder in (part, old):
        if folder.exists():
            shutil.rmtree(folder)


def _free(stub: str, zoo: Path, owner: str | None) -> str:
    number, candidate = 1, stub
    while not is_free(candidate, zoo, owner):
        number += 1
        candidate = f"{stub}-{number}"
    return candidate
