"""How many connections there may be, by how many files this process may open."""

from __future__ import annotations

import resource
from ast import literal_eval
from pathlib import Path

import pytest
from bounded import outcome

from sparse_exp.serve.connections import room_for_connections


def with_files(soft: int, hard: int, wanted: int = 512) -> str:
    """What is found in a process that may open so many files: connections, backlog and its new limit."""

    def look() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        found = room_for_connections(wanted)
        raise SystemExit((*found, resource.getrlimit(resource.RLIMIT_NOFILE)[0]))

    return outcome(look)


def test_the_soft_limit_is_raised():
    assert with_files(256, 4096) == "SystemExit: (512, 128, 4096)"


def test_fewer_files_are_fewer_connections():
    held = len(list(Path("/proc/self/fd").iterdir()))
    said = with_files(150 + held, 150 + held)
    connections, backlog, limit = literal_eval(said.removeprefix("SystemExit: "))
    assert limit == 150 + held
    assert 30 < connections < 100
    assert backlog > 4
    assert with_files(150 + held, 150 + held, wanted=10).startswith("SystemExit: (10, ")


@pytest.mark.parametrize("files", [20, 50])
def test_hardly_any_files_are_refused(files):
    assert with_files(files, files).endswith("Allow more: ulimit -n 1024.")
