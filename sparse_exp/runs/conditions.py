"""What a run was made with besides its configuration: code, packages, data and host."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import sparse_exp
from sparse_exp.files import sha256_of
from sparse_exp.hardware import host_facts
from sparse_exp.tracking.source import source_tags

_PACKAGE = Path(sparse_exp.__file__).parent
NOT_RECORDED = "not recorded"
_COMMIT, _DIRTY = "mlflow.source.git.commit", "git.dirty"


@dataclass(frozen=True)
class Difference:
    """One thing that is not now as it was when a run was made.

    Attributes:
        kind: ``code``, ``packages``, ``data``, ``host`` or ``configuration``.
        what: of that kind.
        then: as it was.
        now: as it is.
    """

    kind: str
    what: str
    then: str
    now: str


def code_facts() -> dict[str, str]:
    """Version, digest of the package's sources, and as far as they are known commit and dirty flag."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(_PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    tags = source_tags()
    git = {name: tags[tag] for name, tag in (("commit", _COMMIT), ("dirty", _DIRTY)) if tag in tags}
    return {"version": sparse_exp.__version__, "sources": digest.hexdigest()[:16], **git}


def host_record() -> dict[str, Any]:
    """The facts of this machine that numbers depend on; see `sparse_exp.hardware.HostFacts`."""
    facts = asdict(host_facts())
    del facts["python"]  # among the packages
    return {**facts, "isa": " ".join(facts["isa"])}


def packages() -> list[str]:
    """Python and every installed package, as ``name==version``; the lines of ``environment.txt``.

    Copies that setuptools carries for itself, and puts on the path once it was imported, do not count.
    """
    return [f"python=={sys.version.split()[0]}", *_installed()]


@cache  # reading them takes half a second; the jobs of a sweep may share a process
def _installed() -> tuple[str, ...]:
    found = [each.metadata for each in distributions() if "_vendor" not in str(each.locate_file(""))]
    return tuple(sorted({f"{each['Name']}=={each['Version']}" for each in found}, key=str.lower))


def current(recipe: Path) -> dict[str, Any]:
    """What a run's manifest records under ``conditions`` when the run starts.

    Args:
        recipe: file of its recipe.
    """
    return {"code": code_facts(), "host": host_record(), "recipe": sha256_of(recipe)}


def code_differences(then: Mapping[str, Any]) -> Iterator[Difference]:
    """Version, commit and sources, where they are others now.

    With the same sources the code is the same, whatever the commits. Where their digest was not recorded, it
    is so with the same commit without uncommitted changes.

    Args:
        then: as `code_facts`; what is missing was not recorded.
    """
    now = code_facts()
    at_commit = {"commit": now.get("commit"), "dirty": "false"}
    unchanged = {name: now.get(name) for name in at_commit} == at_commit
    same_commit = unchanged and {name: then.get(name) for name in at_commit} == at_commit
    if then.get("sources") == now["sources"] or ("sources" not in then and same_commit):
        return
    for name in ("version", "commit", "sources"):
        if name in then or name == "commit":
            yield from difference("code", name, *(facts.get(name, "")[:16] or None for facts in (then, now)))
    if "true" in (then.get("dirty"), now.get("dirty")):
        words = {"true": "yes", "false": "no", None: NOT_RECORDED}
        dirty = (words.get(facts.get("dirty"), "unknown") for facts in (then, now))
        yield Difference("code", "uncommitted changes", *dirty)


def package_differences(then: Sequence[str], now: Sequence[str] | None = None) -> Iterator[Difference]:
    """Packages that have another version now, one each; those that are no longer there or new, together.

    Args:
        then: lines of ``environment.txt``; empty: not recorded.
        now: likewise; None: `packages`.
    """
    before, after = _versions(then), _versions(packages() if now is None else now)
    if not before:
        yield Difference("packages", "all", NOT_RECORDED, f"{len(after)} installed")
        return
    for name in sorted({*before} & {*after}):
        if not before[name] & after[name]:
            yield Difference("packages", name, " ".join(before[name]), " ".join(after[name]))
    if gone := sorted({*before} - {*after}):
        yield Difference("packages", "no longer installed", ", ".join(gone), "-")
    if new := sorted({*after} - {*before}):
        yield Difference("packages", "installed since", "-", ", ".join(new))


def _versions(lines: Sequence[str]) -> dict[str, set[str]]:
    """Versions by the name of the package; several where it is installed in several places."""
    found: dict[str, set[str]] = {}
    for line in lines:
        name, sign, version = line.strip().partition("==")
        if sign:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), set()).add(version)
    return found


def host_differences(then: Mapping[str, Any]) -> Iterator[Difference]:
    """Facts of the host that are others now.

    Args:
        then: as `host_record`; what is missing was not recorded.
    """
    now = host_record()
    for name in now if then else ("cpu",):
        yield from difference("host", name, then.get(name), now[name])


def difference(kind: str, what: str, then: Any, now: Any) -> Iterator[Difference]:
    """The difference between two values, where there is one; None: not recorded, or not known now."""
    if then != now:
        yield Difference(
            kind, what, NOT_RECORDED if then is None else str(then), "unknown" if now is None else str(now)
        )
