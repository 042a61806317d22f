"""Videos that this very module writes, and broken ones."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from sparse_exp.errors import DataError
from sparse_exp.predict.video import Video, VideoWriter, write_video

SIZE = (64, 48)


def frame(number: int) -> Image.Image:
    """Red grows, blue falls."""
    return Image.new("RGB", SIZE, (20 * number, 0, 200 - 20 * number))


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    with write_video(path, 12.5) as writer:
        for number in range(10):
            writer.add(frame(number))
    return path


def test_frames_come_back(clip):
    with Video(clip) as video:
        assert (video.fps, video.count) == (12.5, 10)
        frames = list(video.frames())
    assert len(frames) == 10
    for number, pixels in enumerate(frames):
        assert pixels.shape == (48, 64, 3)
        np.testing.assert_allclose(pixels.mean((0, 1)), np.asarray(frame(number)).mean((0, 1)), atol=12)


@pytest.mark.parametrize("name", ["12:30.mp4", "a%02d b.mp4", "über.mp4"])
def test_names_that_mean_something_to_others(clip, tmp_path, monkeypatch, name):
    """FFmpeg would take what is before a colon for a protocol."""
    monkeypatch.chdir(tmp_path)
    clip.rename(name)
    with Video(Path(name)) as video, write_video(Path(f"of {name}"), video.fps) as writer:
        for pixels in video.frames():
            writer.add(Image.fromarray(pixels))
    with Video(Path(f"of {name}")) as video:
        assert len(list(video.frames())) == 10


def test_a_name_that_is_no_utf_8_is_refused(clip, tmp_path):
    """It would end the process: OpenCV crashes."""
    odd = clip.rename(tmp_path / os.fsdecode(b"\xfc.mp4"))
    with pytest.raises(DataError, match="UTF-8"):
        Video(odd)


@pytest.mark.parametrize("said", [0.0, float("nan"), 90_000.0])
def test_rates_that_no_video_has(clip, monkeypatch, said):
    """Some files say the ticks of their clock, which cannot be written again."""
    opened = cv2.VideoCapture

    class Odd:
        def __init__(self, path: str) -> None:
            self._real = opened(path)

        def get(self, number: int) -> float:
            return said if number == cv2.CAP_PROP_FPS else self._real.get(number)

        def __getattr__(self, name: str):
            return getattr(self._real, name)

    monkeypatch.setattr(cv2, "VideoCapture", Odd)
    with Video(clip) as video:
        assert video.fps == 25


@pytest.mark.parametrize("size", [(321, 241), (320, 7)])
def test_odd_sizes_lose_a_row_and_a_column(tmp_path, size):
    """MPEG-4 has colours for every second pixel."""
    path = tmp_path / "odd.mp4"
    with write_video(path, 10) as writer:
        writer.add(Image.new("RGB", size, (9, 99, 199)))
    with Video(path) as video:
        (pixels,) = video.frames()
    assert pixels.shape[:2] == (size[1] // 2 * 2, size[0] // 2 * 2)
    np.testing.assert_allclose(pixels.mean((0, 1)), (9, 99, 199), atol=12)


def test_a_video_that_is_cut_short_is_not_there(tmp_path):
    def interrupted() -> None:
        with write_video(tmp_path / "clip.mp4", 10) as writer:
            writer.add(frame(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_broken_ones(clip, tmp_path, capfd):
    content = clip.read_bytes()
    for name, part in (("cut.mp4", content[: len(content) // 2]), ("empty.mp4", b""), ("text.avi", b"hello")):
        (tmp_path / name).write_bytes(part)
        with pytest.raises(DataError, match=name):
            Video(tmp_path / name)
    assert capfd.readouterr().err == ""  # FFmpeg says nothing beside our line


def test_missing_frames_are_told(clip, caplog):
    with caplog.at_level(logging.WARNING), Video(clip) as video:
        video.count = 20
        assert len(list(video.frames())) == 10
    assert "Only 10 of 20 frames" in caplog.text


def test_a_video_that_was_not_written_whole_is_an_error(tmp_path, monkeypatch):
    """OpenCV does not say that the disk is full."""

    def lose(self) -> None:
        self._writer.release()
        self._path.write_bytes(self._path.read_bytes()[:200])

    def write() -> None:
        with write_video(tmp_path / "clip.mp4", 10) as writer:
            writer.add(frame(0))

    monkeypatch.setattr(VideoWriter, "close", lose)
    with pytest.raises(OSError, match="not written whole"):
        write()
    assert not list(tmp_path.iterdir())
