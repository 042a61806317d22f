"""Predictions for all sources: images first, then video after video, and what is kept of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sparse_exp.errors import DataError
from sparse_exp.files import landing
from sparse_exp.predict.detector import Detector
from sparse_exp.predict.drawing import encode
from sparse_exp.predict.outputs import PictureNames, Results
from sparse_exp.predict.pipeline import Found, Input, Pipeline
from sparse_exp.predict.sources import Sources
from sparse_exp.progress import progress

if TYPE_CHECKING:
    from sparse_exp.predict.video import Video

_log = logging.getLogger(__name__)
_TOLD = 5  # images that cannot be read and are named one by one


@dataclass
class Prediction:
    """The prediction of all sources, step by step.

    Args:
        detector: loaded.
        folder: where annotated pictures and videos go.
        pictures: whether there are to be any.
        results: that are added to.
        threads: for each of decoding and drawing.
    """

    detector: Detector
    folder: Path
    pictures: bool
    results: Results
    threads: int

    def __post_init__(self) -> None:
        self._names = PictureNames()
        self._number = 0

    def run(self, sources: Sources) -> None:
        """Go through all sources.

        Raises:
            DataError: an output cannot be written. What was complete before is there.
            EngineError: the engine failed.
        """
        try:
            self._images(sources)
            for path in sources.videos:
                self._video(path)
        except OSError as error:
            do = "Free or allow the space, or choose another directory with --out."
            reason = error.strerror or error
            raise DataError(f"Cannot write into {self.folder}: {reason}. {do}") from error

    def _images(self, sources: Sources) -> None:
        if not sources.images:
            return
        inputs = (Input(path) for path in sources.images)
        found_in = closing(self._run(inputs, encode))
        with _showing("Images", len(sources.images), "images") as count, found_in as every:
            for found in every:
                picture = self._keep_picture(found)
                self._add(found, picture)
                count()

    def _keep_picture(self, found: Found[bytes]) -> str | None:
        """Write an annotated picture whole or not at all, and only once it is its image's turn."""
        if found.drawn is None:
            return None
        suffix = ".png" if found.drawn.startswith(b"\x89PNG") else ".jpg"
        name = self._names.name(found.input.file, suffix)
        with landing(self.folder / name) as temporary:
            temporary.write_bytes(found.drawn)
        return name

    def _video(self, path: Path) -> None:
        from sparse_exp.predict.video import Video

        try:
            video = Video(path)
        except DataError as error:
            self._skip(path, str(error))
            return
        name = self._names.name(path, ".mp4") if self.pictures else None
        first = len(self.results.images)
        try:
            self._frames(path, video, name)
        except BaseException:  # what was found stays, but there is no annotated video
            for entry in self.results.images[first:]:
                entry["picture"] = None
            raise

    def _frames(self, path: Path, video: Video, name: str | None) -> None:
        from sparse_exp.predict.video import writing

        target = writing(self.folder / name, video.fps) if name else nullcontext()
        with video, target as writer, _showing(path.name, video.count, "frames") as count:
            inputs = (Input(path, number, frame) for number, frame in enumerate(video.frames()))
            with closing(self._run(inputs, _as_it_is)) as every:
                for found in every:
                    if writer is not None and found.drawn is not None:
                        writer.add(found.drawn)
                    self._add(found, name, video.fps)
                    count()

    def _run(
        self, inputs: Iterator[Input], render: Callable[[Image.Image], Any]
    ) -> Generator[Found[Any], None, None]:
        with Pipeline(self.detector, render if self.pictures else None, threads=self.threads) as pipeline:
            yield from pipeline.run(inputs)

    def _add(self, found: Found[Any], picture: str | None, fps: float | None = None) -> None:
        self._number += 1
        if found.problem:
            self._skip(found.input.file, found.problem)
        else:
            self.results.add(self._number, found, picture, fps)

    def _skip(self, file: Path, problem: str) -> None:
        self.results.skipped.append({"file": str(file), "reason": problem})
        if len(self.results.skipped) <= _TOLD:
            _log.warning("%s", problem)


def _as_it_is(picture: Image.Image) -> Image.Image:
    return picture


@contextmanager
def _showing(what: str, total: int, unit: str) -> Iterator[Callable[[], None]]:
    """A progress bar that also says how fast it goes; yields a function that counts one."""
    started, done = time.monotonic(), 0

    def count() -> None:
        nonlocal done
        done += 1
        bar.advance(note=f"{done / max(1e-9, time.monotonic() - started):.1f} {unit}/s")

    with progress(what, total or None, unit) as bar:
        yield count
