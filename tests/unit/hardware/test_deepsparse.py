"""The search for an interpreter that has DeepSparse, with programs that pretend to be one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sparse_exp.config.schema import Experiment, HardwareConfig
from sparse_exp.errors import ConfigError, MissingDependency
from sparse_exp.hardware import deepsparse
from sparse_exp.hardware.deepsparse import FOLDER, VARIABLE, find_deepsparse, require_python, using
from sparse_exp.hardware.targets import compare, fit_to_host, fitted


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """A machine without DeepSparse."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(deepsparse, "_CHECKOUT", tmp_path / "checkout")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "place" / ".venv"))
    monkeypatch.setattr(deepsparse, "find_spec", lambda name: None)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def python(path: Path, version: str = "1.8.0", *, broken: str = "") -> Path:
    """A program that answers as an interpreter does that has DeepSparse, or that cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    says = f"echo 'Traceback'; echo '{broken}' >&2; exit 1" if broken else f"echo {version}"
    path.write_text(f"#!/bin/sh\n{says}\n")
    path.chmod(0o755)
    return path


def test_where_there_is_none_it_says_so_and_what_to_do(tmp_path):
    found = find_deepsparse()
    assert (found.python, found.version, found.wrong) == (None, "", False)
    place = tmp_path / "place" / FOLDER
    assert found.line == (
        f"deepsparse: not installed. With Python 3.8 to 3.11: python3.11 -m venv {place} && "
        f"{place}/bin/pip install deepsparse==1.8.0."
    )
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "Makefile").touch()
    assert "Run: make setup" in find_deepsparse().line
    with pytest.raises(MissingDependency, match="make setup"):
        require_python()


@pytest.mark.parametrize(
    ("system", "machine"), [("Darwin", "arm64"), ("Linux", "aarch64"), ("Darwin", "x86_64")]
)
def test_elsewhere_it_cannot_be_had(monkeypatch, system, machine):
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert find_deepsparse().problem == "exists for Linux on x86-64 only"


def test_the_order_in_which_it_is_looked_for(monkeypatch, tmp_path):
    expected = []
    for place in (tmp_path / "place", tmp_path / "checkout"):
        expected.append(python(place / FOLDER / "bin" / "python"))
        assert find_deepsparse().python == expected[-1]
    monkeypatch.setattr(deepsparse, "find_spec", lambda name: object())
    monkeypatch.setattr(sys, "executable", str(python(tmp_path / "this", "1.7")))
    assert find_deepsparse().version == "1.7"
    monkeypatch.setenv(VARIABLE, str(python(tmp_path / "by variable", "1.6")))
    assert find_deepsparse().version == "1.6"
    assert find_deepsparse(str(python(tmp_path / "named", "1.5"))).version == "1.5"


def test_what_is_broken_says_why_and_what_to_do(tmp_path):
    folder = tmp_path / "place" / FOLDER
    (folder / "bin").mkdir(parents=True)
    assert find_deepsparse().line.startswith(
        f"deepsparse: {folder}/bin/python is no program. Remove {folder}. "
    )
    python(folder / "bin" / "python", broken="ModuleNotFoundError: No module named numpy")
    found = find_deepsparse()
    assert found.problem == f"{folder}/bin/python cannot be used: ModuleNotFoundError: No module named numpy"
    assert found.wrong
    assert "\n" not in found.line


@pytest.mark.parametrize("broken", ["No package metadata was found for deepsparse", ""])
def test_one_that_is_named_must_have_it(tmp_path, broken):
    named = tmp_path / "named"
    if broken:
        python(named, broken=broken)
    hardware = HardwareConfig(
        name="mine", engines=["deepsparse", "onnxruntime"], deepsparse_python=str(named)
    )
    (mismatch,) = compare(hardware)
    assert mismatch.refused
    assert broken in mismatch.refusal
    assert "hardware.deepsparse_python" in mismatch.refusal
    with pytest.raises(ConfigError, match="named"):
        fit_to_host(Experiment(hardware=hardware))


def test_without_it_a_target_is_measured_in_the_other_engines_and_says_so(monkeypatch):
    monkeypatch.setattr("sparse_exp.hardware.targets.find_spec", lambda name: object())
    asked = Experiment(hardware=HardwareConfig(name="cpu"))
    left, (clause,) = fit_to_host(asked)
    assert left.hardware.engines == ["onnxruntime", "openvino"]
    assert clause.startswith("without deepsparse: not installed (")
    alone = HardwareConfig(name="alone", engines=["deepsparse"])
    with pytest.raises(ConfigError, match="deepsparse to be installed"):
        fitted(alone)


def test_using_lasts_as_long_as_its_block(monkeypatch, tmp_path):
    named = python(tmp_path / "named")
    with using(str(named)):
        assert require_python() == named
        with using(None):
            assert require_python() == named
    assert VARIABLE not in os.environ
    monkeypatch.setenv(VARIABLE, "before")
    with using(str(named)):
        pass
    assert os.environ[VARIABLE] == "before"
