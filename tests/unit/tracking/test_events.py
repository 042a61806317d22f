import json
from pathlib import Path

import pytest

from sparse_exp.tracking import Artifact, Dataset, Metrics, Model, Tags, as_plain, epoch_metrics, from_plain


def events(folder: Path) -> list:
    return [
        Metrics({"val/map50": 0.5}, 3),
        Metrics({"size/onnx_mb": 1e-9}),
        Tags({"recipe": "prüne\n"}),
        Dataset("trees", "0123", "index:a==1!b", "train", 100),
        Artifact(folder / "plots", "report"),
        Artifact(Path("/elsewhere/ü.md")),
        Model(folder / "deployment" / "model.onnx", "crowns", "candidate", {"map50": "0.5"}),
    ]


def test_every_kind_of_event_is_read_back_as_it_was(tmp_path):
    for event in events(tmp_path):
        plain = json.loads(json.dumps(as_plain(event, tmp_path)))
        assert from_plain(plain, tmp_path) == event


def test_a_run_that_was_moved_takes_its_files_along(tmp_path):
    plain = as_plain(Artifact(tmp_path / "old" / "report.md"), tmp_path / "old")
    assert plain["path"] == "report.md"
    assert from_plain(plain, tmp_path / "moved").path == tmp_path / "moved" / "report.md"


@pytest.mark.parametrize("plain", [{}, {"event": "pause"}, {"event": "tags", "value": {}}])
def test_what_is_no_event_is_refused(tmp_path, plain):
    with pytest.raises((KeyError, TypeError)):
        from_plain(plain, tmp_path)


def test_an_epoch_is_told_at_its_step_without_the_time_at_which_it_ended():
    record = {"epoch": 1.5, "phase": "pruned", "loss/box": 0.25, "ended": 1e9}
    assert epoch_metrics(record) == Metrics({"epoch": 1.5, "loss/box": 0.25}, 150)
