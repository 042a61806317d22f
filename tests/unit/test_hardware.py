from __future__ import annotations

import os
import platform
import subprocess
import sys

import psutil
import pytest

from sparse_exp import hardware
from sparse_exp.config.schema import ENGINES, HardwareConfig
from sparse_exp.engines import create_engine
from sparse_exp.hardware import check_engines, has_bf16, host_facts, isa_of, usable_physical_cores

ZEN3 = "fpu sse sse2 ssse3 fma avx f16c avx2 bmi2 vaes vpclmulqdq"
ICE_LAKE = f"{ZEN3} avx512f avx512bw avx512_vnni"
SAPPHIRE_RAPIDS = f"{ICE_LAKE} avx_vnni avx512_bf16 amx_bf16 amx_tile amx_int8"
ALDER_LAKE = f"{ZEN3} avx_vnni"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets what the module reads: /proc/cpuinfo, the affinity, the siblings of each CPU, the quota."""

    def pretend(flags=ZEN3, siblings=("0", "1"), quota="max 100000", affinity=None):
        (tmp_path / "cpuinfo").write_text(
            f"processor\t: 0\nmodel name\t: Some CPU @ 3 GHz: fast\nflags\t\t: {flags}\n\nflags : none\n"
        )
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        for cpu, line in enumerate(siblings):
            (tmp_path / f"siblings{cpu}").write_text(f"{line}\n")
        monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(hardware, "_QUOTA", tmp_path / "cpu.max")
        monkeypatch.setattr(hardware, "_TOPOLOGY", str(tmp_path / "siblings{cpu}"))
        cpus = set(range(len(siblings))) if affinity is None else affinity
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: cpus)

    return pretend


@pytest.mark.parametrize(
    ("flags", "isa"),
    [
        ("", ()),
        ("fpu sse avx", ()),
        (ZEN3, ("avx2",)),
        (ICE_LAKE, ("avx2", "avx512", "vnni")),
        (SAPPHIRE_RAPIDS, ("avx2", "avx512", "vnni", "bf16", "amx")),
        (ALDER_LAKE, ("avx2", "vnni")),
    ],
)
def test_isa_of_known_cpus(flags, isa):
    assert isa_of(flags) == isa


def test_facts_are_read_from_cpuinfo(machine):
    machine(ICE_LAKE, siblings=("0-1", "0-1", "2-3", "2-3"))
    facts = host_facts()
    assert facts.cpu == "Some CPU @ 3 GHz: fast"
    assert facts.isa == ("avx2", "avx512", "vnni")
    assert facts.usable_cores == 4
    assert facts.memory_gb == pytest.approx(psutil.virtual_memory().total / 1e9, abs=0.051)
    assert facts.python == platform.python_version()
    assert facts.os.startswith(platform.system())


@pytest.mark.parametrize(("flags", "bf16"), [(ICE_LAKE, False), (SAPPHIRE_RAPIDS, True), ("amx_bf16", True)])
def test_bf16_in_hardware(machine, flags, bf16):
    machine(flags)
    assert has_bf16() is bf16


@pytest.mark.parametrize(
    ("siblings", "affinity", "quota", "cores"),
    [
        (("0", "1"), None, "max 100000", 2),
        (("0-1", "0-1", "2-3", "2-3"), None, "max 100000", 2),
        (("0,2", "1,3", "0,2", "1,3"), {0, 2}, "max 100000", 1),
        (("0,2", "1,3", "0,2", "1,3"), {0, 1}, "max 100000", 2),
        (("0", "1", "2", "3"), None, "250000 100000", 2),
        (("0", "1", "2", "3"), None, "50000 100000", 1),
        (("0", "1", "2", "3"), None, "900000 100000", 4),
        (("0", "1", "2", "3"), None, "", 4),
        (("0-1", "0-1", "2-3", "2-3"), None, "300000 100000", 2),
    ],
)
def test_usable_physical_cores(machine, siblings, affinity, quota, cores):
    machine(siblings=siblings, affinity=affinity, quota=quota)
    assert usable_physical_cores() == cores


def test_this_host_has_between_one_and_all_logical_cores():
    assert 1 <= usable_physical_cores() <= psutil.cpu_count()


def test_no_problems_where_all_is_well(machine):
    machine(ZEN3)
    assert check_engines(HardwareConfig(name="cpu", cores=[2])) == []


def test_an_engine_that_is_not_installed_is_a_problem(machine, monkeypatch):
    machine(ZEN3)
    monkeypatch.setattr(hardware, "find_spec", lambda name: None if name == "openvino" else object())
    (problem,) = check_engines(HardwareConfig(name="cpu"))
    assert "openvino" in problem
    assert "pip install 'openvino>=" in problem


def test_only_configured_engines_are_checked(machine, monkeypatch):
    machine(ZEN3)
    monkeypatch.setattr(hardware, "find_spec", lambda name: None if name == "openvino" else object())
    assert check_engines(HardwareConfig(name="cpu", engines=["onnxruntime"])) == []


def test_a_cpu_without_avx2_cannot_run_deepsparse_and_too_many_cores_cannot_be_had(machine):
    machine("fpu sse avx")
    problems = check_engines(HardwareConfig(name="cpu", cores=[3]))
    assert len(problems) == 2
    assert "AVX2" in problems[0]
    assert "Some CPU" in problems[0]
    assert "hardware.cores to be at most the 2" in problems[1]
    assert not any("\n" in problem for problem in problems)


def test_checking_imports_no_engine_and_nothing_heavy():
    code = (
        "import sys\n"
        "from sparse_exp import benchmark, engines, hardware\n"
        "from sparse_exp.config.schema import HardwareConfig\n"
        "hardware.check_engines(HardwareConfig())\n"
        "heavy = {'torch', 'mlflow', 'sparseml', 'deepsparse', 'onnxruntime', 'openvino', 'onnx'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_to_install_is_what_the_engines_say():
    assert {name: create_engine(name).requirement for name in ENGINES} == hardware._INSTALL
