"""``python -m sparse_exp.hardware``."""

from __future__ import annotations

import json
import sys

import pytest
from cpus import ICE_LAKE, OLD, ZEN3

from sparse_exp.config.schema import ENGINES
from sparse_exp.hardware.__main__ import main


@pytest.fixture
def said(monkeypatch, capsys):
    """Calls the command in this process; what it prints."""

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["hardware", *words])
        monkeypatch.setenv("COLUMNS", "100")
        assert main() == 0
        return capsys.readouterr().out

    return call


def test_the_tables_name_the_host_the_engines_and_what_does_not_fit(machine, said):
    machine(ZEN3, quota="150000 100000", without=("openvino",))
    text = said()
    for word in ("Some CPU @ 3 GHz: fast", "avx2", "quota of 1.5", "1 cores", *ENGINES):
        assert word in text
    lines = text.splitlines()
    assert "openvino: not installed. Run: pip install 'openvino>=2025.0'." in lines
    missing = "without openvino: not installed."
    assert f"avx512_vnni does not fit: the CPU lacks avx512 and vnni (it has avx2); {missing}" in lines
    assert f"edge2 does not fit: 1 of 2 cores; {missing}" in lines
    rows = [line.split() for line in lines]
    assert [row[1:6] for row in rows if row[:1] == ["edge2"]] == [
        ["no", "2", "cores,", "320", "px"],
        ["does", "not", "fit:", "1", "of"],
    ]


def test_without_deepsparse_it_says_so_once_and_targets_fit_all_the_same(machine, said):
    machine(ZEN3, without=("deepsparse",))
    text = said()
    assert [line for line in text.splitlines() if line.startswith("deepsparse: ")] == [
        "deepsparse: not installed. Run: make setup."
    ]
    assert "cpu does not fit" not in text
    found = json.loads(said("--json"))
    (target,) = [target for target in found["targets"] if target["target"] == "cpu"]
    assert target["fits"]
    assert target["mismatch"] == ["without deepsparse: not installed (run: make setup)"]
    assert target["recipes"][0] == "quant"  # as for a target whose engines do not skip zeros


def test_as_json_it_is_complete(machine, said):
    machine(ICE_LAKE, siblings=("0-1", "0-1", "2-3", "2-3"))
    found = json.loads(said("--json"))
    assert found["host"]["isa"] == ["avx2", "avx512", "vnni"]
    assert found["host"]["usable_cores"] == 4
    assert found["host"]["usable_physical_cores"] == 2
    assert [engine["engine"] for engine in found["engines"]] == list(ENGINES)
    targets = {target["target"]: target for target in found["targets"]}
    assert targets["avx512_vnni"]["fits"]
    assert targets["avx512_vnni"]["recipes"][0] == "transfer_quant_vnni"
    assert targets["edge2"]["imgsz"] == 320


def test_an_engine_that_the_cpu_cannot_run_says_why(machine, said):
    machine(OLD)
    found = json.loads(said("--json"))
    problems = {engine["engine"]: engine["problem"] for engine in found["engines"]}
    others = dict.fromkeys(("onnxruntime", "openvino", "mnn", "torch"))
    assert problems == {"deepsparse": "needs AVX2", **others}
