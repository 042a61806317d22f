"""Find the start checkpoint of a run, and fetch it where it is not on this machine.

Tried in this order: a model that the local zoo holds under ``model.stub``; the model's sources, first those
whose file is on this machine and then the others; last, checkpoints of smaller sizes that one of the model's
size can be grown from. Where somebody has chosen a start, with ``model.weights`` or another ``model.stub``
than that of the shipped model, only that is tried: in the local zoo, then where it comes from.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparse_exp.config.plain import CONF_DIRECTORY
from sparse_exp.config.schema import ModelConfig, SourceConfig
from sparse_exp.errors import ConfigError, SourceUnavailable, expected
from sparse_exp.files import expanded, sha256_of
from sparse_exp.sources.cache import (
    FetchedFile,
    cached,
    fetch,
    is_remote,
    origin_of,
    require_form,
    without_fragment,
)
from sparse_exp.sources.download import ADVICE
from sparse_exp.sources.layout import checkpoint_in
from sparse_exp.sources.local import find
from sparse_exp.sources.stub import STUB_PREFIX, parse_stub

_log = logging.getLogger(__name__)
SCRATCH = "scratch"
PARENT = "parent"  # as a teacher: the network of the run itself, before its first channels go


@dataclass(frozen=True)
class StartFile:
    """The file that a training starts from.

    Attributes:
        file: the file on this machine.
        name: where the weights come from, for people: the file's origin, or ``grown:yolov5s(coco)``.
        grown: whether the file is of a smaller size than the model, so that the model is grown from it.
    """

    file: FetchedFile
    name: str
    grown: bool = False

    def as_facts(self) -> dict[str, str]:
        """The plain data that the fetch stage records for later stages."""
        facts = {"origin": self.name, "sha256": self.file.sha256, "path": str(self.file.path)}
        return facts | ({"grown_from": self.file.origin} if self.grown else {})

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> StartFile | None:
        """The start checkpoint that a finished fetch stage has recorded; no source is asked.

        Args:
            facts: of the fetch stage.

        Returns:
            None where they name no file, or one that is gone or another now.
        """
        path, sha256, name = Path(facts.get("path", "")), facts.get("sha256"), str(facts.get("origin"))
        if not path.is_file() or sha256_of(path) != sha256:
            return None
        origin = str(facts.get("grown_from", name))
        return cls(FetchedFile(path, sha256, origin, downloaded=False), name, "grown_from" in facts)


def cached_start(model: ModelConfig, cache: Path, zoo: Path) -> StartFile | None:
    """The start checkpoint if its file is on this machine; nothing is fetched.

    Args:
        model: names the sources.
        cache: directory for downloads.
        zoo: the local zoo.

    Returns:
        The first file of the model's own size, or else the first one to grow the model from. None where
        neither is here, and for ``model.weights=scratch``.
    """
    if model.weights == SCRATCH:
        return None
    published = _published(model.stub, zoo) if model.stub and not chosen(model) else None
    file = published or _first_here(_sources(model), cache, zoo)
    if file:
        return StartFile(file, file.origin)
    return _grown_here(model, cache, zoo)


def fetch_start(model: ModelConfig, cache: Path, zoo: Path) -> StartFile | None:
    """Fetch the start checkpoint from the first source that has it.

    Args:
        model: names the sources.
        cache: directory for downloads.
        zoo: the local zoo.

    Returns:
        The file, or None where ``model.weights=scratch`` asks for random weights.

    Raises:
        SourceUnavailable: no source has it, and no smaller size can be fetched either; the message gives
            the reason of each source.
        CheckpointError: the file of a smaller size is no checkpoint.
    """
    if model.weights == SCRATCH:
        return None
    here = cached_start(model, cache, zoo)
    if model.stub and not chosen(model) and not _published(model.stub, zoo):
        _log.info("No pruned start: %s is not in the local zoo. Looking for a dense one.", model.stub)
    if here and not here.grown:
        return here
    reasons: list[str] = []
    file = _first_fetched(_sources(model), cache, zoo, reasons)
    if file:
        return StartFile(file, file.origin)
    grown = here or _grown_fetched(model, cache, zoo, reasons)
    if grown is None:
        raise SourceUnavailable(_why_none(model, reasons))
    _log.info("No %s can be had: its start is %s, from %s.", model.name, grown.name, grown.file.origin)
    return grown


def chosen(model: ModelConfig) -> str | None:
    """What alone a training may start from, as somebody has chosen it; None: what the model offers."""
    if model.weights or not model.stub or not is_shipped(model.name):
        return model.weights
    shipped = yaml.safe_load(_option(model.name).read_text(encoding="utf-8"))["stub"]
    return model.stub if shipped != model.stub else None


def is_shipped(name: str) -> bool:
    """Whether a model is one of ours, whose ``model.stub`` is known where nobody has chosen another."""
    return _option(name).is_file()


def _option(name: str) -> Path:
    return CONF_DIRECTORY / "model" / f"{name}.yaml"


def require_place(key: str, uri: str, word: str) -> None:
    """Refuse a URI that cannot lead to a checkpoint, without using the network.

    Args:
        key: of the configuration.
        uri: see `locate`.
        word: that the key accepts besides URIs, for the message.

    Raises:
        ConfigError: the stub, hash or package is malformed, or the file does not exist.
        SourceUnavailable: a directory holds no checkpoint.
    """
    source = _checked(SourceConfig(uri=uri))
    path = expanded(source.uri)
    if is_remote(source.uri):
        require_form(source.uri)
    elif path.is_dir():
        checkpoint_in(path)
    elif not path.is_file():
        do = f"Give a path, a directory in SparseZoo's layout, zoo:STUB, https://, index: or {word}."
        raise ConfigError(expected(key, "an existing file", uri, do))


def locate(uri: str, cache: Path, zoo: Path, *, sha256: str | None = None) -> FetchedFile:
    """A checkpoint file on this machine; it is fetched where it is not here yet.

    Args:
        uri: a path; a directory in SparseZoo's layout; a stub, which is looked up in the local zoo first;
            or ``https://...`` or ``index:...``, perhaps followed by ``#sha256=...``.
        cache: directory for downloads.
        zoo: the local zoo.
        sha256: that the file must have.

    Raises:
        ConfigError: the URI is malformed.
        SourceUnavailable: it cannot be fetched, or has another hash than promised.
    """
    return _located(SourceConfig(uri=uri, sha256=sha256), cache, zoo)


def teacher_file(
    teacher: str | None, cache: Path, zoo: Path, *, baseline: Path | None = None, offline: bool = False
) -> Path | None:
    """The checkpoint that a distilling recipe learns from.

    Args:
        teacher: ``self``, ``baseline``, ``parent``, or a URI as for `locate`; None: there is no teacher.
        cache: directory for downloads.
        zoo: the local zoo.
        baseline: the dense counterpart's checkpoint, where one was trained or found.
        offline: only look on this machine.

    Returns:
        The file. None for ``self`` and ``parent``, for a baseline that does not exist yet, and for a file
        that is not on this machine where ``offline`` is set.

    Raises:
        SourceUnavailable: the checkpoint cannot be fetched.
    """
    if teacher in (None, "self", "baseline", PARENT):
        return baseline if teacher == "baseline" else None
    found = find_here(SourceConfig(uri=teacher), cache, zoo) if offline else locate(teacher, cache, zoo)
    return found.path if found else None


def _located(source: SourceConfig, cache: Path, zoo: Path) -> FetchedFile:
    return find_here(source, cache, zoo) or fetch(_checked(source), cache)


def _checked(source: SourceConfig) -> SourceConfig:
    """The source, its hash in the field ``sha256``; refuses the stub of a recipe."""
    if source.uri.startswith(STUB_PREFIX) and parse_stub(source.uri).names_recipe:
        do = "Leave out recipe and recipe_type."
        raise ConfigError(expected("the stub of a checkpoint", "one that names no recipe", source.uri, do))
    return without_fragment(source)


def find_here(source: SourceConfig, cache: Path, zoo: Path) -> FetchedFile | None:
    """The file of a source if it is on this machine: in the local zoo, in the cache, or where a path says.

    Raises:
        ConfigError: its URI is malformed.
        SourceUnavailable: the file has another hash than promised.
    """
    source = _checked(source)
    if source.uri.startswith(STUB_PREFIX):
        return _published(source.uri, zoo) or cached(source, cache)
    folder = expanded(source.uri)
    if not is_remote(source.uri) and folder.is_dir():
        return cached(SourceConfig(uri=str(checkpoint_in(folder)), sha256=source.sha256), cache)
    return cached(source, cache)


def _sources(model: ModelConfig) -> list[SourceConfig]:
    return [SourceConfig(uri=only)] if (only := chosen(model)) else list(model.sources)


def _published(stub: str, zoo: Path) -> FetchedFile | None:
    """The checkpoint that the local zoo holds under a stub."""
    if not zoo.is_dir():
        return None
    folder = find(stub, zoo)
    if folder is None:
        return None
    path = checkpoint_in(folder, parse_stub(stub).parameters.get("checkpoint"))
    digest = sha256_of(path)
    return FetchedFile(path, digest, origin_of(f"local zoo {stub}", digest), downloaded=False)


def _first_here(sources: Sequence[SourceConfig], cache: Path, zoo: Path) -> FetchedFile | None:
    return next((file for source in sources if (file := find_here(source, cache, zoo))), None)


def _first_fetched(
    sources: Sequence[SourceConfig], cache: Path, zoo: Path, reasons: list[str]
) -> FetchedFile | None:
    """The file of the first source that has it; why the sources before it do not is added to ``reasons``."""
    for source in sources:
        try:
            return _located(source, cache, zoo)
        except SourceUnavailable as error:
            _log.info("%s", error)
            reasons.append(str(error))
    return None


def _grown_here(model: ModelConfig, cache: Path, zoo: Path) -> StartFile | None:
    for source in () if chosen(model) else model.grow_from:
        file = find_here(source, cache, zoo)
        if file:
            return _grown(file, source)
    return None


def _grown_fetched(model: ModelConfig, cache: Path, zoo: Path, reasons: list[str]) -> StartFile | None:
    for source in () if chosen(model) else model.grow_from:
        file = _first_fetched([source], cache, zoo, reasons)
        if file:
            return _grown(file, source)
    return None


def _grown(file: FetchedFile, source: SourceConfig) -> StartFile:
    from sparse_exp.yolov5 import read_checkpoint

    checkpoint = read_checkpoint(file.path)
    trained_on = source.trained_on or f"{checkpoint.num_classes} classes"
    return StartFile(file, f"grown:yolov5{checkpoint.size}({trained_on})", grown=True)


def _why_none(model: ModelConfig, reasons: Sequence[str]) -> str:
    tried = " ".join(reason.removesuffix(ADVICE).strip() for reason in reasons)
    tried = tried or f"{model.name} names no source."
    smaller = "" if chosen(model) or model.grow_from else " There is no smaller size to grow it from."
    do = "Give a checkpoint with model.weights=PATH, or start from random weights: model.weights=scratch."
    do = f"Check the network. {do}" if reasons else do
    return f"{tried}{smaller} {do}"
