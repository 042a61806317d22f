from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from sparse_exp.data import detection, digits, load_dataset, scan
from sparse_exp.data.writing import is_written
from sparse_exp.errors import DataError


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    return digits.materialize(tmp_path / "set", imgsz=64, train=5, val=2, test=0)


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of images that are read, as they are."""
    seen: list[str] = []
    original = scan._scan
    monkeypatch.setattr(scan, "_scan", lambda image, *rest: seen.append(image.stem) or original(image, *rest))
    return seen


def cache_file(cache: Path) -> Path:
    (file,) = cache.rglob("*.json")
    return file


def test_the_second_time_no_file_is_read(yaml: Path, tmp_path: Path, looked: list[str]) -> None:
    first = load_dataset(yaml, cache=tmp_path / "cache")
    assert len(looked) == 7
    assert load_dataset(yaml, cache=tmp_path / "cache") == first == load_dataset(yaml)
    assert len(looked) == 14  # those of the last, without a cache


@pytest.mark.parametrize("change", ["label", "image", "same size and time", "label gone", "label new"])
def test_what_has_changed_is_read_again(yaml: Path, tmp_path: Path, looked: list[str], change: str) -> None:
    cache = tmp_path / "cache"
    label = yaml.parent / "labels/train/002.txt"
    if change == "label new":
        content = label.read_bytes()
        label.unlink()
    before = load_dataset(yaml, cache=cache)
    looked.clear()
    if change == "label":
        label.write_text("0 0.5 0.5 0.5 0.5\n")
    elif change == "image":
        Image.new("RGB", (64, 64)).save(yaml.parent / "images/train/002.png")
    elif change == "same size and time":
        text, stat = label.read_text(), label.stat()
        label.write_text(f"{(int(text[0]) + 1) % 10}{text[1:]}")
        os.utime(label, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (label.stat().st_size, label.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    elif change == "label gone":
        label.unlink()
    else:
        label.write_bytes(content)
    after = load_dataset(yaml, cache=cache)
    assert looked == ["002"]
    assert after.digest != before.digest
    assert after == load_dataset(yaml)


def test_more_classes_are_a_new_question(yaml: Path, tmp_path: Path) -> None:
    load_dataset(yaml, cache=tmp_path / "cache")
    text = yaml.read_text().partition("names:")[0]
    yaml.write_text(text + "names: [only one]\n")
    with pytest.raises(DataError, match=r"a class id of 0\.\.0"):
        load_dataset(yaml, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"no json",
        b'{"format": 2}',
        b"[]",
        b"null",
        b'{"format": 2, "reading": [10, 0], "scans": {"a": 1}}',
    ],
)
def test_a_damaged_cache_is_built_again(yaml: Path, tmp_path: Path, damage: bytes, looked: list[str]) -> None:
    cache = tmp_path / "cache"
    wanted = load_dataset(yaml, cache=cache)
    whole = cache_file(cache).read_bytes()
    cache_file(cache).write_bytes(damage)
    looked.clear()
    assert load_dataset(yaml, cache=cache) == wanted
    assert len(looked) == 7
    assert cache_file(cache).read_bytes() == whole


def test_problems_are_remembered_too(yaml: Path, tmp_path: Path, looked: list[str]) -> None:
    (yaml.parent / "labels/train/001.txt").write_text("0 0.5 0.5 0.5 0.5\n77 0.5 0.5 0.5 0.5\n")
    messages = []
    for _ in range(2):
        with pytest.raises(DataError, match=r"001\.txt:2 to be a class id of 0\.\.9") as caught:
            load_dataset(yaml, cache=tmp_path / "cache")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert len(looked) == 7


def test_a_cache_that_cannot_be_written(yaml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    assert load_dataset(yaml, cache=tmp_path / "cache") == load_dataset(yaml)
    assert "checked again next time" in caplog.text


def test_nothing_is_written_beside_the_data(yaml: Path, tmp_path: Path) -> None:
    def listing() -> set[Path]:
        return set(yaml.parent.rglob("*"))

    before = listing()
    load_dataset(yaml, cache=tmp_path / "cache")
    assert listing() == before


def test_several_at_once(yaml: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_dataset(yaml, cache=tmp_path / "cache").digest, range(8)))
    assert set(found) == {load_dataset(yaml).digest}
    assert list((tmp_path / "cache/scans").iterdir()) == [cache_file(tmp_path / "cache")]


def test_samples_carry_what_is_in_their_labels(yaml: Path) -> None:
    dataset = load_dataset(yaml)
    for sample in dataset.splits["train"]:
        bare = detection.Sample(sample.image, sample.label)
        assert sample.labels_of(10).tolist() == bare.labels_of(10).tolist()


def test_a_generated_set_is_hashed_once(yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_written(yaml.parent)
    monkeypatch.setattr("sparse_exp.data.writing._digest", lambda _: pytest.fail("hashed again"))
    assert is_written(yaml.parent)
    monkeypatch.undo()
    image = yaml.parent / "images/train/000.png"
    content = image.read_bytes()
    image.write_bytes(content[:-1])
    assert not is_written(yaml.parent)
    image.write_bytes(content)  # other times, the same content
    assert is_written(yaml.parent)
