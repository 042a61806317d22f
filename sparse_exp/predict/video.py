"""Videos: their frames, and annotated ones."""

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

from sparse_exp.errors import DataError, expected
from sparse_exp.files import landing

_log = logging.getLogger(__name__)
_USUAL_FPS = 25.0
_FPS = (0.01, 1000.0)  # what MPEG-4 can hold; some files say 90000, or nan
_QUIET = "-8"  # AV_LOG_QUIET of FFmpeg


class Video:
    """A video file that is open for reading; use it as a context manager.

    Args:
        path: of the file.

    Attributes:
        fps: frames per second; 25 where the file says none, or none that a video can have.
        count: frames that the file says it has; 0 where it says none.

    Raises:
        DataError: OpenCV cannot read a frame of it.
    """

    def __init__(self, path: Path) -> None:
        cv2 = _opencv()
        self._path = path
        self._capture = cv2.VideoCapture(_name(path))
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
        """Its frames in order: RGB, uint8 (H, W, 3); turned as the file says. One pass only.

        A warning says so where there are fewer than the file promises by more than one in a hundred.
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
        return frame[:, :, ::-1].copy() if good else None


class VideoWriter:
    """Writes frames into a video; see `writing`.

    Args:
        path: MP4 file.
        fps: frames per second.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self._path, self._fps = path, fps
        self._writer: Any = None

    def add(self, frame: Image.Image) -> None:
        """Append a picture; all are of one size.

        Raises:
            OSError: the file cannot be written.
        """
        pixels = np.asarray(frame)[:, :, ::-1]
        if self._writer is None:
            self._open(frame.size)
        self._writer.write(pixels)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.release()

    def _open(self, size: tuple[int, int]) -> None:
        cv2 = _opencv()
        code = cv2.VideoWriter_fourcc(*"mp4v")  # MPEG-4 part 2: in every build of OpenCV
        self._writer = cv2.VideoWriter(_name(self._path), code, self._fps, size)
        if not self._writer.isOpened():
            message = "OpenCV cannot write MPEG-4 there"
            raise OSError(None, message, str(self._path))


@contextmanager
def writing(path: Path, fps: float) -> Iterator[VideoWriter]:
    """A video that is there when the block ends well, and otherwise not at all.

    Args:
        path: MP4 file.
        fps: frames per second.

    Yields:
        What to give the frames to, at least one.

    Raises:
        OSError: it cannot be written.
    """
    with landing(path) as temporary:
        writer = VideoWriter(temporary, fps)
        try:
            yield writer
        finally:
            writer.close()
        _require_whole(temporary)


def _require_whole(path: Path) -> None:
    """OpenCV does not say when the disk is full; then the index at the file's end is missing."""
    try:
        with Video(path):
            pass
    except DataError as error:
        message = "the video was not written whole; there may be no space left"
        raise OSError(None, message, str(path)) from error


def _name(path: Path) -> str:
    """A path as OpenCV can take it.

    FFmpeg reads a name such as 12:30.mp4 as a protocol and an address, and OpenCV crashes on one that is no
    UTF-8.
    """
    name = str(path.absolute())
    try:
        name.encode()
    except UnicodeEncodeError as error:
        do = "Rename it."
        raise DataError(expected("the name of the video", "UTF-8", str(path), do)) from error
    return name


def _opencv() -> Any:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", _QUIET)  # our one line says it
    import cv2

    cv2.setLogLevel(0)
    cv2.setNumThreads(1)
    return cv2
