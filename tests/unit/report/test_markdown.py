import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from sparse_exp.report.markdown import ReportData, write_report

RESULT = {
    "val/map50": 0.5481,
    "val/map50_95": 0.2031,
    "deployed/deepsparse/map50": 0.5453,
    "verify/deepsparse/score_mean": 0.00213,
    "verify/deepsparse/score_max": 0.0729,
    "verify/deepsparse/box_mean_px": 0.371,
    "verify/deepsparse/box_max_px": 5.39,
    "verify/deepsparse/matched_of_torch": 0.971,
    "verify/deepsparse/matched_of_engine": 0.968,
    "verify/deepsparse/map50_difference": -0.0016,
    "verify/deepsparse/map50_difference_error": 0.0019,
    "sparsity/onnx": 0.7502,
    "size/onnx_gzip_mb": 2.914,
}
LOAD = {"key": "b1", "scenario": "sync", "batch": 1, "streams": 1, "cores": 2, "imgsz": 320, "spread": 0.034}
TRIES = [
    {"streams": 1, "options": {}, "items_per_s": 8.0},
    {"streams": 1, "options": {"a": 1}, "items_per_s": 16},
]
SPEEDS = [
    {**LOAD, "engine": "openvino", "variant": "dense", "items_per_s": 16.0,
     "each": [16.0] * 5, "tries": TRIES, "options": {"a": 1}},
    {**LOAD, "engine": "deepsparse", "variant": "sparse", "items_per_s": 40.0,
     "each": [40.0] * 5, "latency_p50_ms": 25.13, "map50": 0.55, "size_mb": 7.31, "noisy": True},
    {**LOAD, "engine": "torch", "variant": "sparse", "impossible": "It has no | integers."},
]  # fmt: skip


@pytest.fixture
def report(tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "training curves ü.png").write_bytes(b"png")
    return ReportData(
        title="yolov5s on trees",
        command="python -m sparse_exp seed=1",
        result=RESULT,
        summary={"recipe": "transfer_quant | pruned"},
        origin="The official COCO weights.",
        pruning="Pruned to 75 % before training.",
        phases=[{"phase": "pruned", "epochs": "0-22"}, {"phase": "pruned_quant", "epochs": "22-25"}],
        recovery="Keeps 98.1% of the dense mAP50 0.612 (run\nx).",
        layers=tmp_path / "sparsity.csv",
        speeds=SPEEDS,
        conditions={"host": "2 cores"},
        warnings=["The host\nis busy."],
        pictures={"Training": tmp_path / "plots" / "training curves ü.png", "Gone": tmp_path / "gone.png"},
        attributions=["Photos: NEON, MIT"],
        environment={"python": "3.11"},
    )


def rows_of(text):
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line[:1] == "|"
    ]


def test_the_page_holds_the_given_facts(report, tmp_path):
    write_report(tmp_path / "report.md", report)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    rows = rows_of(text)
    assert ["torch", "0.5481", "0.2031", ""] in rows
    assert ["deepsparse", "0.5453", "-", "-0.0028"] in rows
    assert ["deepsparse", "0.0021 / 0.073", "0.37 / 5.4", "97.1% / 96.8%", "-0.0016 ± 0.0019"] in rows
    assert ["prunable weights, exported file", "75.02%"] in rows
    assert ["deployed", "-", "-", "2.91", "-"] in rows
    assert [
        "deepsparse", "sparse", "sync", "1", "1", "2", "40.00", "3.4%", "25.13", "-", "-", "0.550", "7.3",
        "2.50", "noisy",
    ] in rows  # fmt: skip
    assert ["openvino/dense/b1", "1", "a=1", "2.00", "2"] in rows
    assert ["pruned_quant", "22-25"] in rows
    assert ["recipe", "transfer_quant \\| pruned"] in rows
    assert ["host", "2 cores"] in rows
    assert ["python", "3.11"] in rows
    assert "sparsity.csv" not in text  # which is not there
    for line in ("```sh\npython -m sparse_exp seed=1\n```", "The official COCO weights.", "Pruned to 75 %",
                 "Keeps 98.1% of the dense mAP50 0.612 (run x).", "- The host is busy.",
                 "- Photos: NEON, MIT", "- torch/sparse (b1): It has no | integers."):  # fmt: skip
        assert line in text
    assert text.startswith("# yolov5s on trees\n")


def test_every_row_of_a_table_has_as_many_cells_as_its_head(report, tmp_path):
    write_report(tmp_path / "report.md", report)
    for table in re.findall(r"(?:^\|.*\n)+", (tmp_path / "report.md").read_text(), re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


@pytest.mark.parametrize("place", ["report.md", "deeper/report.md"])
def test_every_picture_that_is_named_is_there(report, tmp_path, place):
    path = tmp_path / place
    write_report(path, report)
    named = re.findall(r"!\[(.*)\]\((\S+)\)", path.read_text(encoding="utf-8"))
    assert [caption for caption, _ in named] == ["Training"]
    assert all((path.parent / unquote(address)).is_file() for _, address in named)
    assert not any(Path(address).is_absolute() for _, address in named)


def test_the_table_of_layers_is_linked(report, tmp_path):
    (tmp_path / "sparsity.csv").write_text("layer,zeros")
    write_report(tmp_path / "deeper" / "report.md", report)
    assert "[sparsity.csv](../sparsity.csv)" in (tmp_path / "deeper" / "report.md").read_text()


def test_parts_without_contents_are_left_out(tmp_path):
    write_report(tmp_path / "report.md", ReportData("Title", "python -m sparse_exp"))
    headings = re.findall(r"^#+ .*", (tmp_path / "report.md").read_text(), re.MULTILINE)
    assert headings == ["# Title", "## How to reproduce"]


def test_a_failure_leaves_the_old_report_and_nothing_half_written(report, tmp_path, monkeypatch):
    path = tmp_path / "out" / "report.md"
    path.parent.mkdir()
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, report)
    assert [p.name for p in path.parent.iterdir()] == ["report.md"]
    assert path.read_text() == "old"
