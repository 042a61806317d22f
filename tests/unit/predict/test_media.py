"""Paths, folders and patterns, and what they mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_exp.data.detection import list_dataset
from sparse_exp.errors import DataError
from sparse_exp.predict.media import find_media


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    names = ("b.jpg", "a.PNG", "._a.png", "notes.txt", "clip.mp4", "below/c.jpg", "empty/x/d.webp")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "images", "videos"),
    [
        (["b.jpg"], ["b.jpg"], []),
        (["."], ["a.PNG", "b.jpg"], ["clip.mp4"]),
        (["*.jpg"], ["b.jpg"], []),
        (["**/*"], ["a.PNG", "b.jpg", "below/c.jpg", "empty/x/d.webp"], ["clip.mp4"]),
        (["below", "b.jpg", "b.jpg", "*.jpg"], ["below/c.jpg", "b.jpg"], []),
    ],
)
def test_what_is_meant(here, words, images, videos):
    found = find_media(words)
    assert [str(path) for path in found.images] == images
    assert [str(path) for path in found.videos] == videos


def test_each_file_once_however_it_is_called(here):
    found = find_media(["b.jpg", str(here / "b.jpg"), "below/../b.jpg"])
    assert [str(path) for path in found.images] == ["b.jpg"]


def test_names_with_spaces_and_letters_of_all_kinds(here):
    (here / "Große Fahrt").mkdir()
    (here / "Große Fahrt" / "日本 1.jpg").touch()
    assert [path.name for path in find_media(["Große Fahrt"]).images] == ["日本 1.jpg"]
    assert [path.name for path in find_media(["Große */*.jpg"]).images] == ["日本 1.jpg"]


def test_names_with_brackets_are_names_first(here):
    (here / "a[1].jpg").touch()
    assert [path.name for path in find_media(["a[1].jpg"]).images] == ["a[1].jpg"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("nothing.jpg", "no such file"),
        ("notes.txt", "must end in one of"),
        ("empty", r"give 'empty/\*\*/\*'"),
        ("*.gif", "Correct the pattern"),
        ("val", "no such file"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_is_nothing(here, word, said):
    with pytest.raises(DataError, match=said) as caught:
        find_media([word])
    assert "\n" not in str(caught.value)


def test_splits_of_a_data_set(digits, here):
    data = list_dataset(digits.root / "data.yaml")
    assert find_media(["val"], data).images == tuple(sample.image for sample in digits.splits["val"])
    (here / "val").mkdir()
    with pytest.raises(DataError, match="with images"):  # what lies here comes first
        find_media(["val"], data)
