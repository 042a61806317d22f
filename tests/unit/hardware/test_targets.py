"""Hardware targets against hosts that pretend to be others."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from itertools import chain

import pytest
from cpus import ALDER_LAKE, ICE_LAKE, OLD, SAPPHIRE_RAPIDS, ZEN3

from sparse_exp.config.plain import CONF_DIRECTORY, options
from sparse_exp.config.runtimes import RUNTIMES
from sparse_exp.config.schema import ENGINES, ISA, HardwareConfig
from sparse_exp.engines import create_engine
from sparse_exp.errors import ConfigError
from sparse_exp.hardware import host_facts
from sparse_exp.hardware.deepsparse import find_deepsparse
from sparse_exp.hardware.targets import advice, compare, fitted, mismatches, prefers, unusable

TARGETS = options("hardware", HardwareConfig)
FOUR = ("0", "1", "2", "3")


def fitting(imgsz=None) -> set[str]:
    return {name for name, target in TARGETS.items() if not compare(target, imgsz=imgsz)}


@pytest.mark.parametrize(
    ("flags", "siblings", "fits"),
    [
        (ZEN3, ("0", "1"), {"all", "cpu", "avx2", "latency", "throughput", "production", "edge2"}),
        (ICE_LAKE, ("0", "1"), set(TARGETS)),
        (SAPPHIRE_RAPIDS, FOUR, set(TARGETS)),
        (ICE_LAKE, ("0-1", "0-1"), set(TARGETS) - {"edge2"}),  # two threads of one core
        (ALDER_LAKE, FOUR, set(TARGETS) - {"avx512_vnni"}),
        (OLD, FOUR, {"production"}),  # DeepSparse needs AVX2
    ],
)
def test_which_shipped_targets_fit_known_cpus(machine, flags, siblings, fits):
    machine(flags, siblings)
    assert fitting() == fits


def test_all_mismatches_are_told_at_once_in_one_line_each_with_what_to_do(machine):
    machine(ZEN3, without=("openvino",))
    target = HardwareConfig(
        name="mine",
        engines=["deepsparse", "openvino"],
        cores=[2, 8],
        isa=["avx2", "avx512", "vnni"],
        imgsz=320,
        production=True,
    )
    refusals = [mismatch.refusal for mismatch in compare(target, imgsz=640)]
    words = (
        ("hardware=mine", "avx2, avx512 and vnni", "Some CPU @ 3 GHz: fast: avx2", "hardware=cpu"),
        ("hardware.cores", "at most the 2", "8", "hardware.cores=[]"),
        ("openvino", "pip install 'openvino>="),
        ("deepsparse", "production", "evaluation only", "hardware.production=false"),
        ("dataset.imgsz", "320 px of hardware=mine", "640", "dataset.imgsz=320"),
    )
    assert len(refusals) == len(words)
    for refusal, expected in zip(refusals, words, strict=True):
        assert all(word in refusal for word in expected), refusal
        assert "\n" not in refusal
        assert refusal.startswith("Expected ")
    assert mismatches(target, imgsz=640) == [
        "the CPU lacks avx512 and vnni (it has avx2)",
        "2 of 8 cores",
        "without openvino: not installed",
        "deepsparse may not be used in production (Neural Magic community: evaluation only)",
        "640 px instead of 320 px",
    ]


def test_a_target_that_asks_for_nothing_fits_any_size_and_any_cores(machine):
    machine(ZEN3)
    assert compare(HardwareConfig(name="cpu"), imgsz=64) == []
    assert compare(HardwareConfig(name="cpu", cores=[2, 1], imgsz=64), imgsz=64) == []


@pytest.mark.parametrize("name", ["all", "cpu", "avx2"])
def test_a_cpu_without_avx2_is_told_of_once(machine, name):
    machine(OLD)
    (mismatch,) = compare(TARGETS[name])
    assert "avx2" in mismatch.refusal.lower()
    assert "Some CPU" in mismatch.refusal


def test_what_is_fitted_has_the_engines_that_run_and_the_cores_that_are_there(machine):
    machine(OLD, without=("openvino",))
    target = HardwareConfig(
        name="mine",
        engines=["deepsparse", "openvino", "onnxruntime"],
        cores=[8, 4, 1],
        isa=["vnni"],
        imgsz=320,
    )
    left = fitted(target)
    assert left.engines == ["onnxruntime"]
    assert left.cores == [2, 1]
    assert (left.isa, left.imgsz, left.name) == (["vnni"], 320, "mine")
    assert target.engines == ["deepsparse", "openvino", "onnxruntime"]  # as it was


def test_what_does_not_fit_but_can_run_is_left_as_it_is(machine):
    machine(ZEN3)
    target = HardwareConfig(name="mine", production=True, isa=["vnni"])
    assert fitted(target) == target


@pytest.mark.parametrize("name", ["production", "all"])
def test_without_an_engine_that_not_every_host_has_the_others_are_measured(machine, name):
    machine(ZEN3, without=("MNN",))
    found = {
        mismatch.clause: mismatch.refused for mismatch in compare(TARGETS[name]) if "mnn" in mismatch.clause
    }
    assert found == {"without mnn: not installed (run: pip install 'MNN>=3.6')": False}
    assert fitted(TARGETS[name]).engines == [engine for engine in TARGETS[name].engines if engine != "mnn"]
    alone = HardwareConfig(name="mine", engines=["mnn"])
    with pytest.raises(ConfigError, match=r"pip install 'MNN>=3.6'"):
        fitted(alone)


def test_the_only_engine_that_cannot_run_is_refused_even_then(machine):
    machine(OLD, without=("openvino",))
    with pytest.raises(ConfigError) as raised:
        fitted(HardwareConfig(name="mine", engines=["deepsparse", "openvino"]))
    assert len(raised.value.problems) == 2
    assert "AVX2" in raised.value.problems[0]
    assert "pip install" in raised.value.problems[1]


@pytest.mark.parametrize(
    ("target", "flags", "best"),
    [
        ("avx2", ZEN3, "transfer_quant"),
        ("avx512_vnni", ICE_LAKE, "transfer_quant_vnni"),
        ("cpu", ZEN3, "transfer_quant"),
        ("cpu", ALDER_LAKE, "transfer_quant_vnni"),
        ("production", ICE_LAKE, "quant"),
    ],
)
def test_the_recipe_that_suits(machine, target, flags, best):
    machine(flags)
    assert prefers(TARGETS[target], host_facts()).recipes[0] == best


def test_every_recipe_that_a_target_names_is_shipped(machine):
    machine(ICE_LAKE)
    named = {recipe for target in TARGETS.values() for recipe in prefers(target, host_facts()).recipes}
    assert named <= {path.stem for path in (CONF_DIRECTORY / "recipe").glob("*.yaml")}


def test_another_recipe_than_those_that_suit_is_advised_against(machine):
    machine(ZEN3)
    (line,) = advice(TARGETS["avx2"], "transfer_quant_vnni")
    assert "recipe=transfer_quant is" in line
    assert "without 8-bit dot products" in line
    assert advice(TARGETS["avx2"], "transfer") == []
    assert advice(TARGETS["cpu"], "dense") == []  # which asks for none


def test_a_host_that_has_more_than_the_target_is_told_of(machine):
    machine(ICE_LAKE)
    (line,) = advice(TARGETS["avx2"], "transfer")
    assert "faster here than there" in line
    assert advice(TARGETS["avx512_vnni"], "transfer_quant") == []


@pytest.mark.parametrize(
    ("scenarios", "unused"),
    [
        (["sync"], ["hardware.streams=[4]"]),
        (["async"], ["hardware.batch_sizes=[16]"]),
        (["throughput"], []),
        (["sync", "async"], []),
    ],
)
def test_settings_that_no_scenario_looks_at_are_told_of(machine, scenarios, unused):
    machine(ZEN3)
    target = HardwareConfig(name="mine", scenarios=scenarios, streams=[4], batch_sizes=[16])
    found = advice(target, "dense")
    assert [line.split(" is not used: ")[0] for line in found] == unused
    assert advice(HardwareConfig(name="mine", scenarios=scenarios), "dense") == []


def test_the_licence_and_what_to_install_are_known_of_each_engine():
    assert ENGINES == ("deepsparse", "onnxruntime", "openvino", "mnn", "torch")
    assert set(RUNTIMES) == set(ENGINES)
    assert {name: create_engine(name).name for name in ENGINES} == {name: name for name in ENGINES}
    project = tomllib.loads((CONF_DIRECTORY.parent / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    installed = {requirement.split(";")[0] for requirement in listed}
    assert {runtime.requirement for runtime in RUNTIMES.values()} <= installed
    assert {isa for runtime in RUNTIMES.values() for isa in runtime.isa} <= set(ISA)
    assert [name for name, runtime in RUNTIMES.items() if not runtime.production] == ["deepsparse"]
    assert [name for name, runtime in RUNTIMES.items() if runtime.optional] == ["deepsparse", "mnn"]
    assert "deepsparse" not in TARGETS["production"].engines
    assert "mnn" in TARGETS["production"].engines


def test_engines_that_are_installed_can_run_here():
    installed = [name for name in ENGINES if name != "deepsparse" or find_deepsparse().python]
    assert {name: unusable(name, host_facts()) for name in installed} == dict.fromkeys(installed)


def test_comparing_imports_no_engine_and_nothing_heavy():
    code = (
        "import sys\n"
        "from sparse_exp import benchmark, engines\n"
        "from sparse_exp.benchmark import why\n"
        "from sparse_exp.config.schema import HardwareConfig\n"
        "from sparse_exp.hardware.targets import advice, compare, fitted\n"
        "compare(HardwareConfig()); fitted(HardwareConfig()); advice(HardwareConfig(), 'dense')\n"
        "heavy = {'torch', 'mlflow', 'sparseml', 'deepsparse', 'onnxruntime', 'openvino', 'onnx'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
