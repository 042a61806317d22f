"""A host that pretends to be another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cpus import ZEN3

from sparse_exp import hardware
from sparse_exp.hardware import __main__ as command
from sparse_exp.hardware import cgroups, targets
from sparse_exp.hardware.deepsparse import DeepSparse


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Sets what is read: /proc/cpuinfo, the affinity, the siblings of each CPU, the quota, packages."""

    def pretend(flags=ZEN3, siblings=("0", "1"), quota="max 100000", affinity=None, without=()):
        (tmp_path / "cpuinfo").write_text(
            f"processor\t: 0\nmodel name\t: Some CPU @ 3 GHz: fast\nflags\t\t: {flags}\n\nflags : none\n"
        )
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        for cpu, line in enumerate(siblings):
            (tmp_path / f"siblings{cpu}").write_text(f"{line}\n")
        monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(cgroups, "_GROUPS", tmp_path)
        monkeypatch.setattr(cgroups, "_OWN_GROUP", tmp_path / "own")
        monkeypatch.setattr(hardware, "_TOPOLOGY", str(tmp_path / "siblings{cpu}"))
        cpus = set(range(len(siblings))) if affinity is None else affinity
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: cpus)
        monkeypatch.setattr(targets, "find_spec", lambda name: None if name in without else object())
        missing = DeepSparse(problem="not installed", do="Run: make setup.")
        here = missing if "deepsparse" in without else DeepSparse(Path("python"), "1.8.0")
        for module in (targets, command):
            monkeypatch.setattr(module, "find_deepsparse", lambda named=None: here)

    return pretend
