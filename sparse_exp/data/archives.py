"""Read files by name from a folder, a zip or a tar, without unpacking it.

The names in an archive serve only to look files up: no file is written to a place that an archive names.
Links and special files in an archive are ignored.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from sparse_exp.errors import DataError

_MAX_FILE = 1 << 28  # bytes; no photo or annotation file is nearly as large: a larger one is an attack
_MAX_TOTAL = 1 << 37  # bytes
_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    RuntimeError,
    NotImplementedError,
)


@dataclass(frozen=True)
class Tree:
    """Files by their names.

    Attributes:
        place: the folder or archives, for messages.
        readers: by relative name (``folder/file``), a function that returns the file's content.
        folder: the folder in which the files lie; None for archives.
    """

    place: str
    readers: dict[str, Callable[[], bytes]]
    folder: Path | None = None

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            DataError: the file is damaged.
        """
        try:
            return self.readers[name]()
        except _BROKEN as error:
            raise DataError(f"Cannot read {name} in {self.place}: {error}. Get the file again.") from error


@contextmanager
def open_tree(places: Sequence[Path]) -> Iterator[Tree]:
    """Open a folder or archives.

    Args:
        places: one folder, or one or more zips and tars, whose files are put together.

    Yields:
        Their files.

    Raises:
        DataError: a place is missing, damaged, or neither a folder nor a zip or tar; or it holds names that
            lead out of it, or files of absurd size.
    """
    with ExitStack() as stack:
        readers: dict[str, Callable[[], bytes]] = {}
        for place in places:
            try:
                readers.update(_open(place, stack))
            except _BROKEN as error:
                do = "Give a folder, a zip or a tar."
                raise DataError(f"Cannot read {place}: {error}. {do}") from error
        folder = places[0] if len(places) == 1 and places[0].is_dir() else None
        yield Tree(", ".join(map(str, places)), readers, folder)


def _open(place: Path, stack: ExitStack) -> dict[str, Callable[[], bytes]]:
    if place.is_dir():
        return dict(_files_below(place))
    if zipfile.is_zipfile(place):
        return _open_zip(stack.enter_context(zipfile.ZipFile(place)), place)
    return _open_tar(stack.enter_context(tarfile.open(place)), place)


def _files_below(folder: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(place, name)
            yield path.relative_to(folder).as_posix(), path.read_bytes


def _open_zip(archive: zipfile.ZipFile, place: Path) -> dict[str, Callable[[], bytes]]:
    members = [member for member in archive.infolist() if not member.is_dir() and not _is_link(member)]
    _require_harmless([(member.filename, member.file_size) for member in members], place)
    # ZipFile reads no more than the size that was checked, however far the compressed data expand.
    return {member.filename: partial(archive.read, member) for member in members}


def _is_link(member: zipfile.ZipInfo) -> bool:
    return (member.external_attr >> 16) & 0o170000 == 0o120000


def _open_tar(archive: tarfile.TarFile, place: Path) -> dict[str, Callable[[], bytes]]:
    members = [member for member in archive.getmembers() if member.isreg()]
    _require_harmless([(member.name, member.size) for member in members], place)
    return {member.name.removeprefix("./"): partial(_read_from_tar, archive, member) for member in members}


def _read_from_tar(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    content = stream.read() if stream else b""
    if len(content) != member.size:
        raise EOFError(f"it ends after {len(content)} of {member.size} bytes")
    return content


def _require_harmless(members: Sequence[tuple[str, int]], place: Path) -> None:
    """Refuse an archive whose members, (name, bytes), would lead out of it or fill the disk."""
    for name, size in members:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or size > _MAX_FILE:
            raise DataError(f"{place} holds {name!r} of {size} bytes, as no data set does. Do not use it.")
    if sum(size for _, size in members) > _MAX_TOTAL:
        raise DataError(f"{place} would unpack to more than {_MAX_TOTAL >> 30} GiB. Do not use it.")
