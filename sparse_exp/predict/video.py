"""Read the frames of videos, and write annotated videos, both with OpenCV."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparse_exp.errors import DataError, MissingDependency, expected, first_line
from sparse_exp.files import landing

_log = logging.getLogger(__name__)
_USUAL_FPS = 25.0
_FPS = (0.01, 1000.0)  # the range that MPEG-4 can hold; some files say 90000, or nan
_QUIET = "-8"  # AV_LOG_QUIET of FFmpeg


class Video:
    """A video file that is open for reading; use it as a context manager.

    Args:
        path: of the file.

    Attributes:
        fps: frames per second; 25 where the file has no rate, or an impossible one.
        count: number of frames according to the file; 0 where it does not say.

    Raises:
        DataError: OpenCV cannot read a single frame.
    """

    def __init__(self, path: Path) -> None:
        cv2 = opencv()
        self._path = path
        self._capture = cv2.VideoCapture(_opencv_name(path))
        fps = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.fps = fps if _FPS[0] <= fps <= _FPS[1] else _USUAL_FPS
        self.count = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self._first = self._read()
        if self._first is None:
            self._capture.release()
            do = "Convert it, for example with ffmpeg to H.264 in MP4."
            raise DataError(expected("the video", "one that OpenCV can read", str(path), do))

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self._capture.release()

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """Yield the frames in order: RGB, uint8 (H, W, 3), turned as the file says. This works once only.

        A warning is logged where more than one in a hundred of the frames in ``count`` is missing.
        """
        frame, read = self._first, 0
        while frame is not None:
            yield frame
            read += 1
            frame = self._read()
        if read < 0.99 * self.count:
            _log.warning("Only %d of %d frames of %s can be read.", read, self.count, self._path)

    def _read(self) -> NDArray[np.uint8] | None:
        good, frame = self._capture.read()
        return np.ascontiguousarray(frame[:, :, ::-1], dtype=np.uint8) if good else None


class VideoWriter:
    """Writes frames into a video; see `write_video`.

    Args:
        path: MP4 file.
        fps: frames per second.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self._path, self._fps = path, fps
        self._writer: Any = None

    def add(self, frame: Image.Image) -> None:
        """Append a picture; all have the same size.

        Raises:
            OSError: the file cannot be written.
        """
        if self._writer is None:  # the size is known now
            cv2 = opencv()
            codec = cv2.VideoWriter.fourcc(*"mp4v")  # MPEG-4 part 2: in every build of OpenCV
            self._writer = cv2.VideoWriter(_opencv_name(self._path), codec, self._fps, frame.size)
            if not self._writer.isOpened():
                message = "OpenCV cannot write MPEG-4 there"
                raise OSError(None, message, str(self._path))
        self._writer.write(np.asarray(frame)[:, :, ::-1])

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.release()


@contextmanager
def write_video(path: Path, fps: float) -> Iterator[VideoWriter]:
    """Write a video whole or not at all: the file appears when the block ends without an error.

    Args:
        path: MP4 file.
        fps: frames per second.

    Yields:
        The writer; at least one frame must be added.

    Raises:
        OSError: the file cannot be written.
    """
    with landing(path) as temporary:
        writer = VideoWriter(temporary, fps)
        try:
            yield writer
        finally:
            writer.close()
        _require_whole(temporary)


def _require_whole(path: Path) -> None:
    """Try to read the first frame: OpenCV reports no full disk, but then the file lacks its index."""
    try:
        with Video(path):
            pass
    except DataError as error:
        message = "the video was not written whole; there may be no space left"
        raise OSError(None, message, str(path)) from error


def _opencv_name(path: Path) -> str:
    """A path in the form that OpenCV reads correctly.

    FFmpeg reads the relative name 12:30.mp4 as a protocol and an address, so the path is made absolute.
    OpenCV crashes on a name that is not UTF-8, so that one is refused.
    """
    name = str(path.absolute())
    try:
        name.encode()
    except UnicodeEncodeError as error:
        do = "Rename it."
        raise DataError(expected("the name of the video", "UTF-8", str(path), do)) from error
    return name


def opencv() -> Any:
    """OpenCV's module, which writes no messages, since ours say what is wrong, and uses one thread only.

    Raises:
        MissingDependency: it is not installed; images do without.
    """
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", _QUIET)
    try:
        import cv2
    except ImportError as error:
        do = "Run: pip install 'sparse-exp[video]', or leave the videos out."
        what = expected("OpenCV, which reads videos,", "installed", first_line(error), do)
        raise MissingDependency(what) from error
    cv2.utils.logging.setLogLevel(0)
    cv2.setNumThreads(1)
    return cv2
