from __future__ import annotations

import platform

import psutil
import pytest
from cpus import ALDER_LAKE, ICE_LAKE, SAPPHIRE_RAPIDS, ZEN3

from sparse_exp.hardware import has_bf16, host_facts, isa_of, usable_physical_cores


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
