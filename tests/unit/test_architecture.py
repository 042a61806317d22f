"""The house plan of docs/architecture.md: no circle, no import upwards, a picture that is not stale."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def plan():
    return runpy.run_path(str(ROOT / "tools" / "architecture.py"))


@pytest.fixture(scope="module")
def graph(plan):
    return plan["imports"]()


def test_every_room_stands_on_a_floor_and_every_floor_has_its_rooms(plan, graph):
    assert set(plan["floors"](PAGE)) == set(plan["rooms"](graph))


def test_no_file_imports_from_a_higher_floor(plan, graph):
    floor_of, room_of = plan["floors"](PAGE), plan["room_of"]
    upward = [
        f"{module} (floor {floor_of[room_of(module)]}) imports {other} (floor {floor_of[room_of(other)]})"
        for module, others in graph.items()
        for other in others
        if "__init__"
        not in (room_of(module), room_of(other))  # sparse_exp/__init__.py: what others may import
        and floor_of[room_of(module)] < floor_of[room_of(other)]
    ]
    assert not upward


def test_no_files_and_no_rooms_import_each_other_in_a_circle(plan, graph):
    assert plan["circle"](graph) == []
    assert plan["circle"](plan["rooms"](graph)) == []


def test_a_circle_and_a_way_around_are_found(plan):
    assert plan["circle"]({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert plan["circle"]({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert plan["_reached"]({"a": {"b"}, "b": {"c"}, "c": set()}, "a") == {"b", "c"}


def test_the_committed_picture_and_list_are_what_the_script_makes(plan):
    assert plan["page"]() == PAGE, "Run: .venv/bin/python tools/architecture.py --write"
