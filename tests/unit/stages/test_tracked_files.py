"""Which exported files the tracker gets: ``tracker.artifacts``."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_exp.files import write_text
from sparse_exp.runs.deployment import Deployment
from sparse_exp.stages.report import _exported
from sparse_exp.tracking import Artifact

DEPLOYED = ["model.onnx", "model.onnxruntime.onnx", "model.qdq.onnx"]
OTHERS = ["dense.onnx", "dense.pt", "dense.int8.openvino.xml", "sparse.fp32.onnx"]


@pytest.fixture
def deployment(tmp_path) -> Deployment:
    for name in (*DEPLOYED, *OTHERS):
        write_text(tmp_path / "deployment" / name, name)
    return Deployment(tmp_path / "deployment")


def test_all_or_those_that_are_deployed_or_none(deployment, tmp_path):
    assert _exported(deployment, "all") == [Artifact(tmp_path / "deployment")]
    found = _exported(deployment, "deployed")
    assert sorted(event.path.name for event in found if isinstance(event, Artifact)) == DEPLOYED
    assert {event.folder for event in found if isinstance(event, Artifact)} == {"deployment"}
    assert _exported(deployment, "none") == []


def test_of_a_run_that_exported_nothing_there_is_nothing(tmp_path):
    assert _exported(Deployment(Path(tmp_path)), "deployed") == []
