"""Write docs/configuration.md from sparse_exp/config/schema.py and the options in conf/.

    python tools/config_reference.py            print the page
    python tools/config_reference.py --write    replace docs/configuration.md

A test compares the committed page with the output, so that the page stays up to date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from sparse_exp.config import schema
from sparse_exp.config.schema import Experiment
from sparse_exp.text import markdown_table

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "configuration.md"

# Meanings of the keys that have none in the schema or in a recipe.
MEANINGS = {
    "name": "name of the run, in its directory and in the tracker",
    "seed": "of everything random: initial weights, order of the images, augmentation",
    "model.name": "name of the option, in run names and tags",
    "dataset.name": "name of the option, in run names and tags",
    "recipe.name": "name of the option, in run names and tags",
    "hardware.name": "name of the option, in tags",
    "trainer.batch_size": "images of one training step",
    "trainer.max_grad_norm": "gradients are scaled down to this norm",
    "trainer.val_batch_size": "images of one evaluation step, in torch and in the engines",
    "tracker.backend": "none: nothing is logged and MLflow is not imported",
    "tracker.experiment": "MLflow experiment that runs are listed under; made when it does not exist",
    "paths.output": "the other output paths start here",
    "recipe.variables.num_epochs": "length of the training, epochs",
    "recipe.variables.quantization_epochs": "the last of them, trained with fake quantization (QAT), epochs",
    "recipe.variables.warmup_epochs": "linear warm-up of the learning rate, epochs",
    "recipe.variables.warmup_lr": "learning rate at the start of the warm-up",
    "recipe.variables.init_lr": "learning rate after the warm-up",
    "recipe.variables.final_lr": "learning rate at the end of the floating-point phases (cosine)",
    "recipe.variables.quantization_init_lr": "learning rate at the start of QAT",
    "recipe.variables.quantization_final_lr": "learning rate at the end of QAT (cosine)",
    "recipe.variables.hardness": "share of the teacher in the loss, 0..1",
    "recipe.variables.temperature": "softens the scores of the teacher, at least 1",
    "recipe.variables.gain": "weight of the differences from the teacher's features",
    "recipe.variables.init_sparsity": "share of zeros that gradual pruning begins with, 0..1",
    "recipe.variables.final_sparsity": "share of zeros that gradual pruning ends with, 0..1",
    "recipe.variables.channels": "share of the multiplications that stays when channels go, 0..1",
    "recipe.variables.steps": "in how many steps they go",
    "recipe.variables.multiple": "widths are multiples of it",
    "recipe.variables.dense_epochs": "the first epochs, with all channels, epochs",
    "recipe.variables.slimming_epochs": "the next ones, from the first channels to go to the last, epochs",
    "recipe.variables.sparsity_1": "share of zeros in blocks of 128 channels (at size l), 0..1",
    "recipe.variables.sparsity_2": "share of zeros in blocks of 256 channels (at size l), 0..1",
    "recipe.variables.sparsity_3": "share of zeros in blocks of 512 channels (at size l), 0..1",
    "recipe.variables.sparsity_4": "share of zeros in blocks of 1024 channels (at size l), 0..1",
    "recipe.variables.pruning_epochs": "the first epochs, in which the sparsity rises, epochs",
    "recipe.variables.pruning_end_epoch": "epoch at which the sparsity has risen to its end",
    "recipe.variables.pruning_update_frequency": "time between two rises of the sparsity, epochs",
    "recipe.variables.weights_warmup_lr": "learning rate of all but biases at the start of the warm-up",
    "recipe.variables.biases_warmup_lr": "learning rate of the biases at the start of the warm-up",
    "recipe.variables.quantization_start_epoch": "epoch at which QAT begins",
    "recipe.variables.quantization_lr": "learning rate of QAT (at its start, where there is a final one)",
    "recipe.variables.final_quantization_lr": "learning rate at the end of QAT (cosine)",
    "recipe.variables.freeze_bn_epoch": "epoch at which batch norm statistics freeze",
    "recipe.variables.observer_share": "share of QAT after which the activation ranges freeze, 0..1",
    "recipe.variables.batch_norm_share": "share of QAT after which batch norm statistics freeze, 0..1",
}

INTRO = """\
<!-- Made by tools/config_reference.py from sparse_exp/config/schema.py and conf/. Do not edit. -->
# Configuration

All keys with their types, units, bounds, defaults and meanings. The command line takes three kinds of words:

    model=yolov5n                          another option of a group (a file in conf/<group>/)
    trainer.batch_size=16                  another value of a key
    experiment=smoke                       a preset that sets several groups at once

The command line beats a preset, a preset beats `conf/local/default.yaml`, and that beats the other
options. Options of your own need no fork: `--config-dir DIR model=mine` also looks for `DIR/model/mine.yaml`,
under names that no shipped option has; `DIR/local/default.yaml` beats `conf/local/default.yaml`, key by key.
`--help` lists the groups, `--cfg job` prints the composed configuration, `--info defaults-tree` shows
where it came from, `dry_run=true` prints the plan. `-m model=yolov5n,yolov5s` makes several runs.

The column "default" holds the value of the group's default option, or else that of the schema. `???` means
that a value must be given. Values outside their bounds, keys that are not listed here, and keys that
contradict each other are refused before anything starts, all in one message.

## Environment variables

| variable | meaning |
|---|---|
| `SPARSE_EXP_CACHE` | downloads and data sets; wins over files, not over a typed `paths.cache` |
| `SPARSE_EXP_ZOO` | the local zoo; wins over files, not over a typed `paths.zoo` |
| `XDG_CACHE_HOME` | where the user's cache lies, if neither is set; `~/.cache` by default |
| `MLFLOW_TRACKING_URI` | tracking server or database; wins over files, not over a typed `tracker.uri` |
| `SPARSE_EXP_LOCKS` | holds the host-wide lock of the benchmark; else `/run/lock`, `/dev/shm` or `/tmp` do |
| `HYDRA_FULL_ERROR=1` | show the traceback of an error in the configuration |
"""

NOTES = {
    "local": "`conf/local/default.yaml`, if you make one, is merged into every run and ignored by git: the "
    "place for settings of one machine, such as `paths.cache` or `hardware.cores`. Begin it with the line "
    "`# @package _global_`.",
    "experiment": "Presets (`# @package _global_`): each sets options and values of several groups.",
    "sweep": "Presets for `--multirun` (`# @package _global_`): each sets keys that vary, and objectives.",
}
OWN = ("local",)  # groups whose options belong to the user


@dataclass(frozen=True)
class KeyRow:
    """A key of the configuration as a row of the table; each attribute is the text of a cell."""

    key: str
    type: str
    unit: str
    bounds: str
    default: str
    meaning: str


def page() -> str:
    """The whole of docs/configuration.md."""
    parts = [INTRO, f"## Top level\n\n{_keys(top_rows())}\n"]
    parts += [_group(name, option) for name, option in groups().items()]
    return "\n".join(parts)


def groups() -> dict[str, str | None]:
    """Each group of the defaults list with its default option, None where it has none."""
    defaults = _read(CONF / "config.yaml")["defaults"]
    pairs = [next(iter(entry.items())) for entry in defaults if isinstance(entry, dict)]
    return {
        name.removeprefix("optional "): option for name, option in pairs if not name.startswith("override ")
    }


def top_rows() -> list[KeyRow]:
    """The keys that belong to no group."""
    values = _read(CONF / "config.yaml")
    return [row for row in _rows(Experiment, values, "") if row.key.split(".")[0] not in groups()]


def group_rows(group: str) -> list[KeyRow]:
    """The keys of a group; empty for a group that is not in the schema."""
    cls = get_type_hints(Experiment).get(group)
    if cls is None:
        return []
    return list(_rows(cls, _option(group, groups()[group]), f"{group}."))


def options_of(group: str) -> list[str]:
    """The options of a group, and those in folders below it (published/NAME) after them."""
    paths = [] if group in OWN else (CONF / group).rglob("*.yaml")
    names = [path.relative_to(CONF / group).with_suffix("").as_posix() for path in paths]
    return sorted(names, key=lambda name: ("/" in name, name))


def variable_rows(option: str) -> list[KeyRow]:
    """The root variables of a recipe option; the recipe derives one without a value from the others."""
    rows = []
    for name, value in _option("recipe", option).get("variables", {}).items():
        key = f"recipe.variables.{name}"
        default = "derived" if value is None else _shown(value)
        rows.append(KeyRow(key, "float", "", "", default, MEANINGS[key]))
    return rows


def _variables(options: list[str]) -> str:
    """A table with a row for each variable: its meaning, and its default in each option that has it."""
    lines = []
    rows = [(row, option) for option in options for row in variable_rows(option)]
    for key, meaning in {row.key: row.meaning for row, _ in rows}.items():
        having = [(row.default, option) for row, option in rows if row.key == key]
        defaults = {value: [o for v, o in having if v == value] for value, _ in having}
        cell = "; ".join(f"{value}: {', '.join(names)}" for value, names in defaults.items())
        lines.append((f"`{key}`", meaning, cell))
    return markdown_table(("key", "meaning", "default: options"), lines, right=())


def _group(name: str, default: str | None) -> str:
    cls = get_type_hints(Experiment).get(name)
    options = options_of(name)
    parts = [f"## {name}", _first_line(cls) if cls else "", NOTES.get(name, "")]
    if len(options) > 1 or not cls:
        parts.append("\n".join(_describe(name, option, default) for option in options))
    if cls:
        parts.append(_keys(group_rows(name)))
    if name == "recipe":
        parts.append(f"Root variables of the recipes, all of them numbers:\n\n{_variables(options)}")
    return "\n\n".join(filter(None, parts)) + "\n"


def _describe(group: str, option: str, default: str | None) -> str:
    text = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8")
    lines = re.match(r"(?:#.*\n)*", text)[0].splitlines()  # type: ignore[index]
    comment = " ".join(line.lstrip("# ") for line in lines if "@package" not in line)
    mark = " (default)" if option == default else ""
    pairs = _settings(_option(group, option))
    settings = ", ".join(f"`{key}={value}`" for key, value in pairs if not key.startswith("variables."))
    return f"- `{group}={option}`{mark}: {comment} Sets {settings}.".replace(":  Sets", ": sets")


def _settings(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each key that an option sets, and its value as on the command line."""
    for key, value in values.items():
        if key == "defaults":  # an option of the same group that this one begins with has no name
            groups = [d for d in value if isinstance(d, dict)]
            yield from (
                (name.removeprefix("override /"), option) for d in groups for name, option in d.items()
            )
        elif isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield prefix + key, " then ".join(item["uri"] for item in value)  # a list of sources
        elif not (isinstance(value, str) and "\n" in value):  # Hydra's help text
            yield prefix + key, _plain(value)


def _rows(cls: type, values: Mapping[str, Any], prefix: str) -> Iterator[KeyRow]:
    """The keys of a dataclass, and those of the dataclasses in it."""
    hints = get_type_hints(cls)
    for item in fields(cls):
        hint = hints[item.name]
        yield _row(item, hint, values, prefix)
        inner = next((kind for kind in (hint, *get_args(hint)) if is_dataclass(kind)), None)
        if inner:
            value = values.get(item.name)
            mark = "[]." if get_origin(hint) is list else "."
            inside = value if isinstance(value, dict) else {}
            yield from _rows(inner, inside, f"{prefix}{item.name}{mark}")


def _row(item: Field[Any], hint: Any, values: Mapping[str, Any], prefix: str) -> KeyRow:
    key, metadata = prefix + item.name, item.metadata
    meaning = metadata.get("help") or MEANINGS.get(key, "")
    if is_dataclass(hint):
        return KeyRow(f"{key}.*", "", "", "", "", _first_line(hint))
    default = item.default if item.default_factory is NO_DEFAULT else item.default_factory()
    value = values.get(item.name, default)
    kind = _SIZE if metadata.get("image_size") else _type(hint)
    return KeyRow(key, kind, metadata.get("unit", ""), _bounds(metadata), _shown(value), meaning)


_SIZE = "int or [int, int]"


def _type(hint: Any) -> str:
    arguments = [argument for argument in get_args(hint) if argument is not type(None)]
    if get_origin(hint) is list:
        return f"list of {_type(arguments[0])}"
    if get_origin(hint) is dict:
        return f"{_type(arguments[1])} by name"
    if arguments:
        return f"{_type(arguments[0])} or null"
    return "source" if is_dataclass(hint) else str(hint.__name__)


def _bounds(metadata: Mapping[str, Any]) -> str:
    if metadata.get("choices"):
        return ", ".join(metadata["choices"])
    low, high, above = (metadata.get(name) for name in ("low", "high", "above"))
    start = "" if low is None else f"at least {low:.10g}" if high is None else f"{low:.10g}"
    if above is not None:
        start = f"above {above:g}"
    return start + ("" if high is None else f" to {high:.10g}")


def _shown(value: Any) -> str:
    if value == schema.MISSING:
        return "`???`"
    if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
        return "by option"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _keys(rows: list[KeyRow]) -> str:
    cells = [(f"`{row.key}`", row.type, row.unit, row.bounds, row.default, row.meaning) for row in rows]
    escaped = [[_escaped(cell) for cell in line] for line in cells]
    return markdown_table(("key", "type", "unit", "bounds", "default", "meaning"), escaped, right=())


def _escaped(cell: str) -> str:
    """Escape a text for a cell of a Markdown table; code between backquotes may hold < and >."""
    return cell if cell.startswith("`") else cell.replace("<", "&lt;")


def _first_line(cls: Any) -> str:
    return str(cls.__doc__).strip().splitlines()[0]


def _option(group: str, option: str | None) -> dict[str, Any]:
    path = CONF / group / f"{option}.yaml"
    return _read(path) if path.is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {})


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
