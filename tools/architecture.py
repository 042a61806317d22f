"""Draw the rooms of the package into docs/architecture.md, from the imports in the code, and list its files.

    python tools/architecture.py            print picture and list
    python tools/architecture.py --write    put them into docs/architecture.md

The page says on which floor a room stands; the picture, and the checks of
tests/unit/test_architecture.py, follow from that and from the code. A room is a file or a folder of
``sparse_exp``; a file ``__main__.py`` is an entry point, in whatever folder it lies.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from sparse_exp.text import between_marks

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sparse_exp"
PAGE = ROOT / "docs" / "architecture.md"
ENTRY = "__main__"
_FLOOR = re.compile(r"^\| (\d+) \| (.+?) \| .+ \|$", re.MULTILINE)
_ROOM = re.compile(r"`([\w.]+)/?`")

Graph = Mapping[str, set[str]]


def floors(page: str) -> dict[str, int]:
    """The floor of each room, as the table of the page says.

    Args:
        page: text of docs/architecture.md.
    """
    return {room: int(floor) for floor, rooms in _FLOOR.findall(page) for room in _ROOM.findall(rooms)}


def modules() -> dict[str, Path]:
    """The files of the package by the name that they are imported under."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports() -> dict[str, set[str]]:
    """Which files of the package each of them imports, wherever in the file that happens."""
    files = modules()
    return {name: set(_imported(path, files)) - {name} for name, path in files.items()}


def _imported(path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom) and node.module in files:
            # A module that is taken from a package; anything else is defined in the package's own file.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in files else str(node.module) for name in names)


def room_of(module: str) -> str:
    """The room that a file lies in: the name below ``sparse_exp``, or the entry points."""
    parts = module.split(".")
    return ENTRY if parts[-1] == ENTRY else parts[1] if len(parts) > 1 else "__init__"


def rooms(graph: Graph) -> dict[str, set[str]]:
    """Which rooms each room imports."""
    found: dict[str, set[str]] = {}
    for module, others in graph.items():
        room = room_of(module)
        found.setdefault(room, set()).update(room_of(other) for other in others)
    return {room: others - {room, "__init__"} for room, others in found.items() if room != "__init__"}


def circle(graph: Graph) -> list[str]:
    """Files or rooms that import each other in a loop; empty where there is none."""
    done: set[str] = set()

    def search(node: str, way: list[str]) -> list[str]:
        if node in way:
            return way[way.index(node) :]
        if node in done:
            return []
        for other in sorted(graph.get(node, ())):
            if found := search(other, [*way, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := search(node, []))), [])


def picture(page: str) -> str:
    """The rooms floor by floor as a Mermaid diagram, with the arrows that say something new.

    An arrow is left out where the same room is reached through another one.
    """
    graph, floor_of = rooms(imports()), floors(page)
    lines = ["```mermaid", "flowchart TD"]
    for floor in sorted(set(floor_of.values()), reverse=True):
        names = [room for room in graph if floor_of.get(room) == floor]
        lines.append(f'  subgraph floor{floor}["{floor}"]')
        lines += [
            "    direction LR",
            *(f"    {_id(name)}[{_label(name)}]" for name in sorted(names)),
            "  end",
        ]
    for room, others in sorted(graph.items()):
        beyond = set().union(*(_reached(graph, other) for other in others))
        lines += [f"  {_id(room)} --> {_id(other)}" for other in sorted(others - beyond)]
    return "\n".join([*lines, "```"])


def files() -> str:
    """The files with the first sentence of their docstrings, folder by folder."""
    lines, folder = ["```"], PACKAGE
    for path in sorted(PACKAGE.rglob("*.py"), key=lambda path: (path.parent, path.name)):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        sentence = " ".join(text.partition("\n\n")[0].split())
        if not sentence:
            continue
        if path.parent != folder:
            lines, folder = [*lines, ""], path.parent
        lines.append(f"{path.relative_to(PACKAGE)!s:31} {sentence}")
    return "\n".join([*lines, "```"])


def page() -> str:
    """docs/architecture.md with picture and list as they are now."""
    text = PAGE.read_text(encoding="utf-8")
    return between_marks(between_marks(text, "rooms", picture(text)), "files", files())


def _reached(graph: Graph, room: str) -> set[str]:
    """The rooms that a room imports, straight or through others."""
    found: set[str] = set()
    ahead = list(graph.get(room, ()))
    while ahead:
        other = ahead.pop()
        if other not in found:
            found.add(other)
            ahead += graph.get(other, ())
    return found


def _id(room: str) -> str:
    return f"r_{room}"  # no word of Mermaid's own


def _label(room: str) -> str:
    return (
        '"entry points"' if room == ENTRY else f'"{room}/"' if (PACKAGE / room).is_dir() else f'"{room}.py"'
    )


def main() -> None:
    """Print picture and list, or put them into the page."""
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(picture(PAGE.read_text(encoding="utf-8")), files(), sep="\n\n")


if __name__ == "__main__":
    main()
