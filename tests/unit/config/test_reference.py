"""docs/configuration.md is what tools/config_reference.py makes, and says something of every key."""

from __future__ import annotations

import runpy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from sparse_exp.config.schema import Experiment

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(ROOT / "tools" / "config_reference.py"))


@pytest.fixture(scope="module")
def rows(tool):
    listed = [*tool["top_rows"]()]
    for group in tool["groups"]():
        listed += tool["group_rows"](group)
    for option in tool["options_of"]("recipe"):
        listed += tool["variable_rows"](option)
    return {row.key: row for row in listed}


def schema_keys(cls, prefix=""):
    """Every leaf of the schema, by a walk of its own."""
    for item in fields(cls):
        hint = get_type_hints(cls)[item.name]
        if is_dataclass(hint):
            yield from schema_keys(hint, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"
            for inner in filter(is_dataclass, get_args(hint)):
                mark = "[]." if "List" in str(hint) else "."
                yield from schema_keys(inner, f"{prefix}{item.name}{mark}")


def test_the_committed_page_is_what_the_script_makes(tool):
    committed = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == tool["page"](), "Run: .venv/bin/python tools/config_reference.py --write"


def test_every_key_of_the_schema_is_listed(rows):
    missing = set(schema_keys(Experiment)) - set(rows)
    assert not missing


def test_every_key_has_a_meaning(rows):
    bare = [key for key, row in rows.items() if not row.meaning]
    assert not bare, "Give them a help text in the schema, or a comment in the recipe"


def test_no_meaning_is_kept_for_a_key_that_is_gone_or_says_it_itself(tool, rows):
    assert [
        key for key, text in tool["MEANINGS"].items() if key not in rows or rows[key].meaning != text
    ] == []


@pytest.mark.parametrize(
    ("key", "column", "expected"),
    [
        ("trainer.lr", "bounds", "above 0 to 1"),
        ("trainer.lr", "type", "float"),
        ("hardware.cores", "type", "list of int"),
        ("hardware.engines", "type", "list of str"),
        ("dataset.imgsz", "unit", "px"),
        ("dataset.imgsz", "default", "`320`"),  # of dataset=trees; the schema's own is 640
        ("model.size", "bounds", "n, s, m, l, x"),
        ("recipe.variables", "type", "float or null by name"),
    ],
)
def test_a_row_says_what_schema_and_option_say(rows, key, column, expected):
    assert getattr(rows[key], column) == expected


def test_each_shipped_option_is_named(tool):
    page, groups = tool["page"](), tool["groups"]()
    for group in (ROOT / "conf").iterdir():
        paths = group.rglob("*.yaml") if group.is_dir() else []
        options = [str(path.relative_to(group).with_suffix("")) for path in paths]
        if group.name in groups and len(options) > 1:
            assert [option for option in options if f"- `{group.name}={option}`" not in page] == []
