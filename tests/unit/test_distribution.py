"""What is handed on with the package."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_wheel_holds_all_of_conf_but_the_settings_of_this_machine():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    names = {path.name for path in (ROOT / "conf").iterdir()} - {"local"}
    assert included == {f"conf/{name}": f"sparse_exp/conf/{name}" for name in names}
