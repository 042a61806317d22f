"""Predict on all images, then on one video after the other, and keep the annotated copies."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sparse_exp.errors import DataError
from sparse_exp.files import landing
from sparse_exp.predict.detector import Detector
from sparse_exp.predict.drawing import encode
from sparse_exp.predict.media import Media
from sparse_exp.predict.outputs import PictureNames, Results
from sparse_exp.predict.pipeline import ImageResult, Input, Pipeline
from sparse_exp.predict.video import Video, write_video
from sparse_exp.progress import progress

_log = logging.getLogger(__name__)
_MOST_WARNINGS = 5  # after as many files that cannot be read, the others are only counted


@dataclass
class Predictor:
    """Runs a detector on images and videos, and adds what it finds to the results.

    Args:
        detector: loaded.
        folder: where annotated pictures and videos are written.
        pictures: whether any are written.
        results: what it adds to.
        threads: how many decode, and how many draw.
    """

    detector: Detector
    folder: Path
    pictures: bool
    results: Results
    threads: int

    def __post_init__(self) -> None:
        self._names = PictureNames()
        self._number = 0

    def run(self, media: Media) -> None:
        """Predict on all images and videos.

        Raises:
            DataError: an output cannot be written. The pictures that were complete before stay.
            EngineError: the engine failed.
        """
        try:
            self._images(media)
            for path in media.videos:
                self._video(path)
        except OSError as error:
            do = "Free or allow the space, or choose another directory with --out."
            reason = error.strerror or error
            raise DataError(f"Cannot write into {self.folder}: {reason}. {do}") from error

    def _images(self, media: Media) -> None:
        if not media.images:
            return
        inputs = (Input(path) for path in media.images)
        with (
            _counting("Images", len(media.images), "images") as count,
            closing(self._pipeline(inputs, encode)) as results,
        ):
            for result in results:
                name = None
                if result.drawn is not None:
                    suffix = ".png" if result.drawn.startswith(b"\x89PNG") else ".jpg"
                    name = self._names.name(result.input.file, suffix)
                    with landing(self.folder / name, durable=False) as temporary:
                        temporary.write_bytes(result.drawn)
                self._add(result, name)
                count()

    def _video(self, path: Path) -> None:
        try:
            video = Video(path)
        except DataError as error:
            self._skip(path, str(error))
            return
        name = self._names.name(path, ".mp4") if self.pictures else None
        try:
            self._frames(path, video, name)
        except BaseException:  # the predictions stay, but there is no annotated video
            self.results.unfinished.update(filter(None, [name]))
            raise

    def _frames(self, path: Path, video: Video, name: str | None) -> None:
        target = write_video(self.folder / name, video.fps) if name else nullcontext()
        with video, target as writer, _counting(path.name, video.count, "frames") as count:
            inputs = (Input(path, number, frame) for number, frame in enumerate(video.frames()))
            with closing(self._pipeline(inputs, lambda picture: picture)) as results:
                for result in results:
                    if writer is not None and result.drawn is not None:
                        writer.add(result.drawn)
                    self._add(result, name, video.fps)
                    count()

    def _pipeline(
        self, inputs: Iterator[Input], render: Callable[[Image.Image], Any]
    ) -> Generator[ImageResult[Any], None, None]:
        with Pipeline(self.detector, render if self.pictures else None, threads=self.threads) as pipeline:
            yield from pipeline.run(inputs)

    def _add(self, result: ImageResult[Any], picture: str | None, fps: float | None = None) -> None:
        self._number += 1
        if result.problem:
            self._skip(result.input.file, result.problem)
        else:
            self.results.add(self._number, result, picture, fps)

    def _skip(self, file: Path, problem: str) -> None:
        self.results.skipped.append({"file": str(file), "reason": problem})
        if len(self.results.skipped) <= _MOST_WARNINGS:
            _log.warning("%s", problem)


@contextmanager
def _counting(what: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    """Show a progress bar with the rate beside it; yields a function that counts one more."""
    started, done = time.monotonic(), 0

    def count() -> None:
        nonlocal done
        done += 1
        bar.advance(note=f"{done / max(1e-9, time.monotonic() - started):.1f} {unit}/s")

    with progress(what, total or None, unit) as bar:
        yield count
