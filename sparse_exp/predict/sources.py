"""The images and videos that a person means by paths, folders and patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_exp.data.detection import SPLITS, Listing
from sparse_exp.data.images import IMAGE_SUFFIXES
from sparse_exp.errors import DataError, expected

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
_FORMS = "an image, a video, a folder of them or a pattern"


@dataclass(frozen=True)
class Sources:
    """What to look at, each file once, in the order in which it was named; folders and patterns by name.

    Attributes:
        images: image files.
        videos: video files.
    """

    images: tuple[Path, ...]
    videos: tuple[Path, ...]


def find_sources(words: Sequence[str], data: Listing | None = None) -> Sources:
    """The files that words mean.

    Args:
        words: image and video files; folders, whose own files count but not those of folders in them;
            patterns such as ``photos/**/*.jpg``; with ``data`` its splits by name.
        data: a data set.

    Raises:
        DataError: a word means nothing, or no image or video.
    """
    files: dict[str, Path] = {}
    for word in words:
        for file in _found(word, data):
            files.setdefault(os.path.abspath(file), file)  # noqa: PTH100 - links count as files of their own
    every = tuple(files.values())
    return Sources(tuple(file for file in every if not _is_video(file)), tuple(filter(_is_video, every)))


def _found(word: str, data: Listing | None) -> list[Path]:
    try:
        return _files(word, data)
    except OSError as error:
        raise DataError(
            f"Cannot read {error.filename or word}: {error.strerror}. Allow it, or correct the name."
        ) from error


def _files(word: str, data: Listing | None) -> list[Path]:
    path = Path(word).expanduser()
    if data is not None and word in SPLITS and not path.exists():
        return _split(word, data)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        if not _is_meant(path):
            known = ", ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
            do = f"Its name must end in one of {known}."
            raise DataError(expected("SOURCE", _FORMS, word, do))
        return [path]
    if glob.has_magic(word):
        return _matching(word, path)
    raise DataError(expected("SOURCE", _FORMS, word, "There is no such file."))


def _split(name: str, data: Listing) -> list[Path]:
    if name not in data.splits:
        there = ", ".join(data.splits)
        raise DataError(expected("SOURCE", f"a split of {data.path}", name, f"It has {there}."))
    return [sample.image for sample in data.splits[name]]


def _in_folder(folder: Path) -> list[Path]:
    found = list(_meant(folder.iterdir()))
    if not found:
        do = f"For images in folders below it give '{folder}/**/*'."
        raise DataError(expected(f"the folder {folder}", "one with images or videos", "none", do))
    return found


def _matching(pattern: str, path: Path) -> list[Path]:
    found = list(_meant(Path(name) for name in glob.glob(str(path), recursive=True)))  # noqa: PTH207
    if not found:
        do = "Correct the pattern; quote it, so that the shell leaves it as it is."
        raise DataError(expected("SOURCE", "a pattern that images or videos match", pattern, do))
    return found


def _meant(paths: Iterable[Path]) -> Iterator[Path]:
    return (path for path in sorted(paths) if _is_meant(path) and path.is_file())


def _is_meant(path: Path) -> bool:
    # Names with a dot in front are litter of operating systems, such as ._photo.jpg of macOS.
    return path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not path.name.startswith(".")


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES
