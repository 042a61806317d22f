"""The directory of a run: made, kept, read again, and what its records say."""

from __future__ import annotations

import errno
import json
import shutil

import pytest

from sparse_exp import files
from sparse_exp.errors import ConfigError
from sparse_exp.files import write_text
from sparse_exp.runs.directory import FORMER, MANIFEST, Run, StageRecord


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def manifest(run: Run) -> dict:
    return json.loads((run.path / MANIFEST).read_text())


def a_run(path) -> Run:
    """With one finished stage, ``export``, that wrote two files."""
    run = Run.create(path, overwrite=False)
    files = [write_text(run.path / "deployment" / name, name) for name in ("a.onnx", "b.onnx")]
    run.record("export", StageRecord("f1", run.digests(files), {"size/onnx_mb": 1.5}, 2.0, {"best": "a"}))
    return run


def test_a_new_run_is_running_and_empty(tmp_path):
    run = Run.create(tmp_path / "runs" / "one", overwrite=False)
    assert names(run.path) == {MANIFEST}
    place = str(run.path)
    assert manifest(run) == {"status": "RUNNING", "key": run.key, "place": place, "stages": {}}


def test_a_run_keeps_its_key_and_one_that_takes_its_place_has_it(tmp_path):
    first, other = (Run.create(tmp_path / name, overwrite=False) for name in ("one", "other"))
    assert first.key != other.key
    assert Run.reopen(first.path).key == Run.create(first.path, overwrite=True).key == first.key
    first.update(key=None)  # as runs of earlier versions
    assert Run.reopen(first.path).key


def test_a_run_that_was_moved_is_itself(tmp_path):
    run = a_run(tmp_path / "run")
    run.update(tracker_run_id="abc")
    run.path.rename(tmp_path / "moved")
    Run.create(run.path, overwrite=False)  # another run, where it was
    moved = Run.reopen(tmp_path / "moved", ["export"])
    assert (moved.key, moved.tracker_run_id, list(moved.records)) == (run.key, "abc", ["export"])


def test_a_copy_of_a_run_becomes_one_of_its_own_once(tmp_path):
    run = a_run(tmp_path / "run")
    run.record("publish", StageRecord("f2"))
    run.update(tracker_run_id="abc")
    before = manifest(run)
    shutil.copytree(run.path, tmp_path / "copy")
    copy = Run.reopen(tmp_path / "copy", ["publish", "register"])
    assert copy.key not in (None, run.key)
    assert (copy.tracker_run_id, copy.state["copied_from"], list(copy.records)) == (None, "abc", ["export"])
    copy.record("publish", StageRecord("f3"))
    copy.update(tracker_run_id="def")
    again = Run.reopen(copy.path, ["publish", "register"])
    assert (again.key, again.tracker_run_id, "publish" in again.records) == (copy.key, "def", True)
    assert manifest(run) == before
    assert Run.reopen(run.path).key == run.key


def test_what_takes_the_place_of_a_copy_has_a_key_of_its_own(tmp_path):
    run = a_run(tmp_path / "run")
    shutil.copytree(run.path, tmp_path / "copy")
    assert Run.create(tmp_path / "copy", overwrite=True).key != run.key


def test_a_run_that_is_reached_by_another_path_is_no_copy(tmp_path):
    run = a_run(tmp_path / "real" / "run")
    run.update(place=str(tmp_path / "link" / "run"))  # as it was called where the link was a directory
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert Run.reopen(run.path).key == run.key


def test_an_empty_directory_becomes_a_run(tmp_path):
    assert Run.create(tmp_path, overwrite=False).path == tmp_path.resolve()


def test_an_existing_run_is_not_touched_without_overwrite(tmp_path):
    run = a_run(tmp_path / "run")
    before = manifest(run)
    with pytest.raises(ConfigError, match="overwrite=true") as error:
        Run.create(run.path, overwrite=False)
    assert "resume=" in str(error.value)
    assert "\n" not in str(error.value)
    assert manifest(run) == before


def test_overwrite_replaces_a_run_whole(tmp_path):
    old = a_run(tmp_path / "run")
    new = Run.create(old.path, overwrite=True)
    assert names(new.path) == {MANIFEST}
    assert manifest(new)["stages"] == {}


def test_overwrite_never_deletes_what_is_no_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=MANIFEST):
        Run.create(tmp_path, overwrite=True)
    assert names(tmp_path) == {"thesis.tex"}


def test_a_place_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"paths\.run"):
        Run.create(tmp_path / "file" / "run", overwrite=False)


def test_reopening_brings_back_records_and_state(tmp_path):
    run = a_run(tmp_path / "run")
    run.update(status="FAILED", failure="no space", tracker="abc")
    again = Run.reopen(run.path)
    assert again.records == run.records
    assert manifest(again)["status"] == "RUNNING"
    assert manifest(again)["failure"] is None
    assert manifest(again)["tracker"] == "abc"
    assert manifest(again)["stages"]["export"]["facts"] == {"best": "a"}


NAMING = ("outputs", "events", "facts")


def naming(path: str, key: str) -> str:
    """A manifest whose record names a file: as an output, in an event, or as what was trained."""
    named = {
        "outputs": {path: "0" * 64},
        "events": [{"event": "artifact", "path": path}],
        "facts": {"checkpoint": path},
    }[key]
    return json.dumps({"stages": {"train": {"fingerprint": "f1", key: named}}})


OUTSIDE = [
    naming(path, key)
    for path in ("../other/manifest.json", "/etc/passwd", "a/../../b", "ü" * 128, "a/" + "b" * 256)
    for key in NAMING
]


@pytest.mark.parametrize("key", NAMING)
def test_a_record_may_name_files_of_the_run(tmp_path, key):
    (tmp_path / MANIFEST).write_text(naming("deployment/..b/" + "ü" * 127, key))
    assert getattr(Run.reopen(tmp_path).records["train"], key)


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "{}", '{"stages": {"train": {"unknown": 1}}}', *OUTSIDE]
)
def test_what_is_no_run_is_not_reopened_nor_changed(tmp_path, content):
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ConfigError, match=MANIFEST) as error:
        Run.reopen(tmp_path)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == (set() if content is None else {MANIFEST})
    if content is not None:
        assert (tmp_path / MANIFEST).read_text() == content


def test_a_stage_is_finished_while_fingerprint_and_files_are_the_same(tmp_path):
    run = Run.reopen(a_run(tmp_path / "run").path)
    assert run.is_finished("export", "f1")
    assert not run.is_finished("export", "f2")
    assert not run.is_finished("train", "f1")


@pytest.mark.parametrize("change", ["edit", "delete", "directory"])
def test_a_stage_whose_file_changed_is_not_finished(tmp_path, change):
    run = a_run(tmp_path / "run")
    file = run.path / "deployment" / "b.onnx"
    if change == "edit":
        file.write_text("B.onnx")
    else:
        file.unlink()
    if change == "directory":
        file.mkdir()
    assert not run.is_finished("export", "f1")


def test_a_moved_run_stays_finished(tmp_path):
    a_run(tmp_path / "run").path.rename(tmp_path / "moved")
    assert Run.reopen(tmp_path / "moved").is_finished("export", "f1")


def test_result_is_flat_and_has_the_time_of_each_stage(tmp_path):
    run = a_run(tmp_path / "run")
    run.record("verify", StageRecord("f", {}, {"val/map50": 0.5}, 0.12345))
    assert run.result() == {
        "size/onnx_mb": 1.5,
        "time/export_s": 2.0,
        "val/map50": 0.5,
        "time/verify_s": 0.123,
    }


def test_going_on_removes_what_a_killed_process_left_half_written(tmp_path):
    run = a_run(tmp_path / "run")
    half = [run.path / ".manifest.4711.part.json", run.path / "deployment" / ".model.qdq.4711.part.onnx"]
    for path in half:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    Run.read(run.path)
    assert all(path.exists() for path in half)  # whoever only reads does not hold the lock
    Run.reopen(run.path)
    assert not any(path.exists() for path in half)


def test_a_start_that_was_killed_before_the_first_manifest_is_in_nobodys_way(tmp_path):
    (tmp_path / ".manifest.4711.part.json").touch()
    Run.create(tmp_path, overwrite=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST]


@pytest.mark.parametrize("torn", ["", '{"status": "RUN', "\0" * 300])
def test_a_manifest_that_a_power_failure_has_torn_costs_the_last_entry_only(tmp_path, torn, caplog):
    run = a_run(tmp_path / "run")
    run.record("verify", StageRecord("f2"))
    (run.path / MANIFEST).write_text(torn)
    again = Run.reopen(run.path)
    assert again.is_finished("export", "f1")
    assert (again.key, list(again.records)) == (run.key, ["export"])
    assert "is damaged: the one before it counts" in caplog.text
    (run.path / MANIFEST).write_text(torn)  # twice in a row: it never takes the place of a good one
    assert list(Run.reopen(run.path).records) == ["export"]


def test_a_torn_manifest_is_told_from_a_missing_one(tmp_path):
    run = a_run(tmp_path / "run")
    (run.path / MANIFEST).unlink()
    with pytest.raises(ConfigError, match=r"to be the directory of a run with its manifest\.json"):
        Run.read(run.path)
    (run.path / MANIFEST).touch()
    (run.path / FORMER).unlink()
    with pytest.raises(ConfigError, match="cannot be read: it is empty, cut off"):
        Run.read(run.path)
    assert Run.create(run.path, overwrite=True).status


def test_on_a_full_disk_the_former_manifest_gives_its_space(tmp_path, monkeypatch):
    run = a_run(tmp_path / "run")

    def write_out(path, real=files._write_out) -> None:
        if (run.path / FORMER).exists() and path.name.startswith(".manifest."):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path)

    monkeypatch.setattr(files, "_write_out", write_out)
    run.update(status="FAILED")
    assert manifest(run)["status"] == "FAILED"
