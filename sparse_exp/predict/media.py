"""Find the images and videos that the words of a command line name."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_exp.data.detection import SPLITS, Listing
from sparse_exp.data.images import IMAGE_SUFFIXES
from sparse_exp.errors import DataError, expected
from sparse_exp.files import expanded

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
_FORMS = "an image, a video, a folder of them or a pattern"


@dataclass(frozen=True)
class Media:
    """Files to predict on, in the order in which they were named; each stands here once.

    Attributes:
        images: image files.
        videos: video files.
    """

    images: tuple[Path, ...]
    videos: tuple[Path, ...]


def find_media(words: Sequence[str], data: Listing | None = None) -> Media:
    """Find the files that words name.

    Args:
        words: image and video files; folders, which stand for the files in them, sorted by name, without
            those in deeper folders; patterns such as ``photos/**/*.jpg``, sorted by name too; with ``data``
            the names of its splits.
        data: a data set.

    Raises:
        DataError: a word names nothing, or a file that is neither image nor video, or cannot be read.
    """
    files: dict[str, Path] = {}
    for word in words:
        try:
            found = _files_of(word, data)
        except OSError as error:
            do = "Allow it, or correct the name."
            raise DataError(f"Cannot read {error.filename or word}: {error.strerror}. {do}") from error
        for file in found:
            files.setdefault(os.path.abspath(file), file)  # noqa: PTH100 - a link counts as a file of its own
    images = [file for file in files.values() if file.suffix.lower() not in VIDEO_SUFFIXES]
    videos = [file for file in files.values() if file.suffix.lower() in VIDEO_SUFFIXES]
    return Media(tuple(images), tuple(videos))


def _files_of(word: str, data: Listing | None) -> list[Path]:
    path = expanded(word)
    if data is not None and word in SPLITS and not path.exists():
        return _files_of_split(word, data)
    if path.is_dir():
        return _files_in_folder(path)
    if path.is_file():
        if not _is_media_file(path):
            known = ", ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
            do = f"Its name must end in one of {known}."
            raise DataError(expected("SOURCE", _FORMS, word, do))
        return [path]
    if glob.has_magic(word):
        return _files_matching(word, path)
    raise DataError(expected("SOURCE", _FORMS, word, "There is no such file."))


def _files_of_split(name: str, data: Listing) -> list[Path]:
    if name not in data.splits:
        do = f"It has {', '.join(data.splits)}."
        raise DataError(expected("SOURCE", f"a split of {data.path}", name, do))
    return [sample.image for sample in data.splits[name]]


def _files_in_folder(folder: Path) -> list[Path]:
    found = _media_among(folder.iterdir())
    if not found:
        do = f"For images in folders below it give '{folder}/**/*'."
        raise DataError(expected(f"the folder {folder}", "one with images or videos", "none", do))
    return found


def _files_matching(pattern: str, path: Path) -> list[Path]:
    found = _media_among(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207
    if not found:
        do = "Correct the pattern; quote it, so that the shell leaves it as it is."
        raise DataError(expected("SOURCE", "a pattern that images or videos match", pattern, do))
    return found


def _media_among(paths: Iterable[Path]) -> list[Path]:
    return [path for path in sorted(paths) if _is_media_file(path) and path.is_file()]


def _is_media_file(path: Path) -> bool:
    # Operating systems leave files whose names begin with a dot, such as ._photo.jpg of macOS.
    return path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not path.name.startswith(".")
