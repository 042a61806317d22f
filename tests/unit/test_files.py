"""Files that land whole or not at all; digests."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import time

import pytest

from sparse_exp.files import (
    fingerprint,
    landing,
    landing_directory,
    remove_left_parts,
    remove_parts,
    sha256_of,
    write_json,
    write_text,
)


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_landing_shows_the_file_only_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "model.onnx"
    with landing(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        assert temporary.parent == target.parent  # else replacing it would not be atomic
        assert temporary.suffix == ".onnx"
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert names(target.parent) == {"model.onnx"}


def test_what_lands_is_on_the_disk_before_its_name_is_and_then_the_name(tmp_path, monkeypatch):
    target, written = tmp_path / "a" / "b.json", []

    def fsync(descriptor: int, real=os.fsync) -> None:
        file = os.fstat(descriptor)
        written.append(("directory" if stat.S_ISDIR(file.st_mode) else file.st_size, target.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(target, "whole")
    assert written == [(5, False), ("directory", True)]
    written.clear()
    with landing_directory(tmp_path / "model") as folder:
        (folder / "below").mkdir()
        (folder / "below" / "c.bin").write_bytes(b"1234")
    assert sorted(map(str, (what for what, _ in written))) == ["4", *["directory"] * 3]


def fail_while_landing(target, error) -> None:
    with landing(target) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_landing_that_fails_leaves_nothing_of_it(tmp_path, error):
    target = tmp_path / "model.onnx"
    with pytest.raises(error):
        fail_while_landing(target, error)
    assert names(tmp_path) == set()


def test_landing_that_fails_keeps_what_was_there(tmp_path):
    target = tmp_path / "model.onnx"
    target.write_text("old")
    with pytest.raises(ValueError):
        fail_while_landing(target, ValueError)
    assert target.read_text() == "old"
    assert names(tmp_path) == {"model.onnx"}


def test_landing_without_a_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), landing(tmp_path / "model.onnx"):
        pass


@pytest.mark.parametrize("below", [True, False])
def test_what_a_killed_process_left_half_written_goes(tmp_path, below):
    def half_written(folder):
        """Files as `landing` leaves them in a process that ends at once."""
        for name in ("model.qdq.onnx", "environment", "a b.tar.xz", "\n.json"):
            if (pid := os.fork()) == 0:
                with landing(folder / name) as temporary:
                    temporary.touch()
                    os._exit(0)
            os.waitpid(pid, 0)

    whole = {".manifest.former.json", ".lock", "model.part.onnx", ".part", "weights", ".x.part.pt"}
    (tmp_path / "weights").mkdir()
    for name in whole - {"weights"}:
        (tmp_path / name).touch()
    half_written(tmp_path)
    half_written(tmp_path / "weights")
    assert len(names(tmp_path)) == len(whole) + 4
    remove_parts(tmp_path, below=below)
    assert names(tmp_path) == whole
    assert len(names(tmp_path / "weights")) == (0 if below else 4)
    remove_parts(tmp_path / "nowhere", below=True)


def test_of_others_only_what_is_old_and_nobody_writes_goes(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    day = time.time() - 90_000
    kept = [f".a.{os.getpid()}.part.json", f".new.{ended.pid}.part.json", ".a.json"]
    for name in (f".a.{ended.pid}.part.json", f".b.{'9' * 30}.part", *kept):
        (tmp_path / name).touch()
        if "new" not in name:
            os.utime(tmp_path / name, (day, day))
    remove_left_parts(tmp_path)
    assert names(tmp_path) == set(kept)
    remove_left_parts(tmp_path / "nowhere")


def test_texts_and_json_are_written_with_their_directories(tmp_path):
    assert write_text(tmp_path / "a" / "b.md", "Grüße").read_text(encoding="utf-8") == "Grüße"
    assert json.loads(write_json(tmp_path / "c.json", {"path": tmp_path}).read_text()) == {
        "path": str(tmp_path)
    }


def test_sha256_is_that_of_hashlib_for_files_longer_than_a_block(tmp_path):
    data = bytes(range(256)) * 5000
    (tmp_path / "data").write_bytes(data)
    assert sha256_of(tmp_path / "data") == hashlib.sha256(data).hexdigest()


def test_fingerprint_does_not_depend_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint({"b": {"d": 3, "c": 2}, "a": 1})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([{"a": 1}], [{"a": 2}]),
        ([{"a": 1}], [{"a": "1"}]),
        ([[1, 2]], [[2, 1]]),
        ([{"a": None}], [{}]),
        (["a", "b"], ["ab"]),
        ([{"a": True}], [{"a": False}]),
        (["x", "y"], ["y", "x"]),
    ],
)
def test_fingerprint_tells_values_apart(one, other):
    assert fingerprint(*one) != fingerprint(*other)
