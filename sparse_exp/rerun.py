"""``python -m sparse_exp.rerun``: a past run once more, from its record, and what is not as it was then."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from sparse_exp.cli import log_to_console
from sparse_exp.command import Parser, run_command
from sparse_exp.config.places import add_place_options, chosen_places, find_places
from sparse_exp.config.plain import as_dict, recipe_path
from sparse_exp.config.schema import AUTO, Experiment, TrackerConfig
from sparse_exp.data import is_prepared, prepare
from sparse_exp.errors import ConfigError, SparseExpError, expected
from sparse_exp.experiment import run
from sparse_exp.files import expanded, sha256_of
from sparse_exp.hints import override
from sparse_exp.resolve import rebuild
from sparse_exp.runs.conditions import (
    NOT_RECORDED,
    Difference,
    code_differences,
    difference,
    host_differences,
    package_differences,
)
from sparse_exp.runs.directory import MANIFEST, Run
from sparse_exp.runs.past import is_run_id, local_directory, tagged_overrides
from sparse_exp.sources.cache import cache_directory
from sparse_exp.text import console_table
from sparse_exp.tracking.reading import fetch_files, read_runs

if TYPE_CHECKING:
    from rich.table import Table

_FILES = ("config.yaml", "environment.txt", MANIFEST)
_KINDS = ("code", "configuration", "packages", "data", "host")  # the order in which they are shown
_HYDRA = ("config.yaml", "hydra.yaml")
_TEXT = """
KEY=VALUE changes single values of the recorded configuration (seed=1, trainer.lr=0.002); groups such as
model= are chosen with python -m sparse_exp. The new run gets a directory of its own below paths.output.

  python -m sparse_exp.rerun outputs/runs/2026-11-22/17-35-11-yolov5s-trees-transfer_quant --dry-run
  python -m sparse_exp.rerun 7050b5eeb8cb4273bdf96825350bcdba seed=1
"""


@dataclass(frozen=True)
class Record:
    """What a past run left of itself.

    Attributes:
        config: text of its ``config.yaml``.
        manifest: empty where there is none.
        environment: lines of its ``environment.txt``; empty where there is none.
        tags: of its MLflow run, where it was read from there.
        hydra: texts of the files below ``.hydra``, by name.
    """

    config: str
    manifest: dict[str, Any]
    environment: list[str]
    tags: dict[str, str] = field(default_factory=dict)
    hydra: dict[str, str] = field(default_factory=dict)

    @property
    def conditions(self) -> dict[str, Any]:
        """As the manifest has them; of runs from before it did, what the tags of MLflow say."""
        tagged = {
            "version": self.manifest.get("version", self.tags.get("sparse_exp.version")),
            "commit": self.tags.get("mlflow.source.git.commit"),
            "dirty": self.tags.get("git.dirty"),
        }
        code = {name: value for name, value in tagged.items() if value is not None}
        cpu = self.tags.get("host.cpu")
        return {"code": code, "host": {"cpu": cpu} if cpu else {}, **self.manifest.get("conditions", {})}

    @property
    def made_with(self) -> dict[str, dict[str, Any]]:
        """Code, host and packages by the stages that were done with them, as ``fetch, plan``.

        There are several where the run went on later with others. Where stages do not say it, there is one,
        of all of them: that of the last start.
        """
        stages: dict[str, list[str]] = {}
        for name, entry in self.manifest.get("stages", {}).items():
            stages.setdefault(entry.get("conditions", ""), []).append(name)
        known = self.manifest.get("environments", {})
        last = {**self.conditions, "packages": self.environment}
        return {", ".join(names): known.get(key, last) for key, names in stages.items()} or {"": last}

    @property
    def overrides(self) -> list[str] | None:
        """The words of its command line; None where they are not known."""
        words = self.manifest.get("overrides", tagged_overrides(self.tags))
        return None if words is None else list(words)

    @property
    def data(self) -> str | None:
        """Digest of its data set; None where it was not recorded."""
        facts = self.manifest.get("stages", {}).get("fetch", {}).get("facts", {})
        digest: str | None = facts.get("dataset") or self.tags.get("dataset.digest")
        return digest


def main() -> int:
    """Say what differs, then start the run, unless it is a dry run."""
    options = _options()
    places = chosen_places(options)
    record = find_record(options.run, places.tracker, places.mlflow)
    experiment, filled = rebuild(record.config, options.overrides)
    experiment, _ = rebuild(record.config, [*settled_words(record.manifest, experiment), *options.overrides])
    place_anew(experiment, options.overrides, options.config_dir)
    show(options.run, differences(record, experiment, filled))
    if options.dry_run or experiment.dry_run:
        return 0

    log_to_console()
    changed = [_as_hydra_reads_it(word, experiment) for word in options.overrides]
    words = None if record.overrides is None else [*record.overrides, *changed]
    told = {} if words is None else {"overrides.yaml": _as_yaml_list(words)}
    named = any(word.startswith("paths.run=") for word in options.overrides)
    run(experiment, {**record.hydra, **told}, words, numbered=not named)
    return 0


def settled_words(manifest: Mapping[str, Any], experiment: Experiment) -> list[str]:
    """Words that set what the data chose for a run, where its configuration leaves it open.

    Args:
        manifest: of the run.
        experiment: its configuration, with the values that are changed.
    """
    words, settled = [], manifest.get("settled", {})
    if experiment.trainer.batch_size == AUTO and settled.get("batch_size"):
        words.append(f"trainer.batch_size={settled['batch_size']}")
    given = "num_epochs" in experiment.recipe.variables or experiment.recipe.num_epochs is not None
    if not given and experiment.model.num_epochs is None and settled.get("num_epochs"):
        words.append(f"recipe.variables.num_epochs={settled['num_epochs']}")
    return words


def _as_hydra_reads_it(word: str, experiment: Experiment) -> str:
    """The word of a Hydra command line for what a word of this one, whose values are YAML, has set."""
    key, value = word.partition("=")[0], as_dict(experiment)
    for name in key.split("."):
        value = value[name]
    return override(key, value)


def find_record(run: str, config: TrackerConfig, store: Path) -> Record:
    """The record of a run, from its directory or, where that is not on this machine, from MLflow.

    Args:
        run: directory, or id of an MLflow run.
        config: names the MLflow server.
        store: directory of the local MLflow database, where no server is named.

    Raises:
        ConfigError: there is no such run, or it left no configuration.
        SparseExpError: MLflow cannot be read.
    """
    directory = expanded(run)
    if is_run_id(run) and not directory.is_dir():
        return _from_mlflow(run, config, store)
    if not (directory / "config.yaml").is_file():
        do = "Give a directory below outputs, or an id that MLflow shows."
        raise ConfigError(expected("RUN", "a run's directory with its config.yaml or MLflow id", run, do))
    return _read(directory)


def _from_mlflow(run_id: str, config: TrackerConfig, store: Path) -> Record:
    found = next((run for run in read_runs(config, store, run_ids=[run_id]) if run.run_id == run_id), None)
    if found is None:
        do = "Give an id that MLflow shows; --uri and --store say where it is."
        raise ConfigError(expected("RUN", "the id of an MLflow run", run_id, do))
    with _folder_of(local_directory(found)) as folder:
        if not (folder / "config.yaml").is_file():
            fetch_files(config, store, run_id, _FILES, folder)
        if not (folder / "config.yaml").is_file():
            do = "Only runs of this project can be run again; of a sweep name one of its runs."
            raise ConfigError(f"The MLflow run {run_id} has no config.yaml. {do}")
        return replace(_read(folder), tags=dict(found.tags))


@contextmanager
def _folder_of(directory: Path | None) -> Iterator[Path]:
    """The directory, or a temporary one where there is none."""
    if directory is not None and (directory / "config.yaml").is_file():
        yield directory
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _read(directory: Path) -> Record:
    texts = {name: _text(directory / ".hydra" / name) for name in _HYDRA}
    return Record(
        config=_text(directory / "config.yaml"),
        manifest=Run.read(directory, "RUN").manifest if (directory / MANIFEST).is_file() else {},
        environment=_text(directory / "environment.txt").splitlines(),
        hydra={name: text for name, text in texts.items() if text},
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def place_anew(experiment: Experiment, overrides: Sequence[str] = (), config_dir: str | None = None) -> None:
    """Give a rebuilt experiment a run directory of its own, and undo how and where the past run was started.

    The record may be anybody's. So it is written where a new run would be, and is told to the tracking server
    of a new run; and the record names no program that is started.

    Args:
        experiment: changed in place.
        overrides: what they set stays.
        config_dir: see `find_places`.

    Raises:
        ConfigError: they name a run to go on with, whose record this one's would take the place of.
    """
    said = {word.partition("=")[0].lstrip("+") for word in overrides}
    if "resume" in said:
        do = "To go on with a run, type: python -m sparse_exp resume=RUN"
        raise ConfigError(f"A run is made again from its beginning, so resume= is of no use here. {do}")
    output = {"paths.output": experiment.paths.output} if "paths.output" in said else {}
    own = find_places(config_dir, output)
    for name in ("output", "mlflow", "zoo", "cache"):
        if f"paths.{name}" not in said:
            place = getattr(own, name)
            setattr(experiment.paths, name, None if place is None else str(place))
    if "tracker.uri" not in said:
        experiment.tracker.uri = own.tracker.uri
    if "hardware.deepsparse_python" not in said:
        experiment.hardware.deepsparse_python = None
    if "paths.run" not in said:
        now, name = datetime.now().astimezone(), experiment.name.replace("/", "-").replace("\0", "-")
        place = Path(experiment.paths.output) / "runs" / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}-{name}"
        experiment.paths.run = str(place)
    experiment.resume = None
    if "overwrite" not in said:
        experiment.overwrite = False


def differences(record: Record, experiment: Experiment, filled: Sequence[str] = ()) -> list[Difference]:
    """What is not as it was when a run was made; nothing is fetched for it.

    Args:
        record: of the run.
        experiment: rebuilt from it.
        filled: keys of the configuration that the record does not have.
    """
    made_with, found = record.made_with, []
    for stages, then in made_with.items():
        one = [
            *code_differences(then.get("code", {})),
            *package_differences(then.get("packages", ())),
            *host_differences(then.get("host", {})),
        ]
        of_some = f" ({stages})" if len(made_with) > 1 else ""
        found += [replace(each, what=f"{each.what}{of_some}") for each in one]
    found += [
        *(Difference("configuration", key, NOT_RECORDED, str(_value(experiment, key))) for key in filled),
        *_recipe_differences(record.conditions.get("recipe"), experiment),
        *data_differences(experiment, record.data),
    ]
    return sorted(found, key=lambda each: _KINDS.index(each.kind))


def _value(node: Any, key: str) -> Any:
    for name in key.split("."):
        node = getattr(node, name)
    return node


def _recipe_differences(then: str | None, experiment: Experiment) -> Iterator[Difference]:
    """Whether the file of the recipe is another now; those of SparseZoo do not change."""
    path = recipe_path(experiment.recipe.file)
    now = sha256_of(path) if path.is_file() else None
    if then is not None and now is not None and then != now:
        yield Difference("configuration", f"recipe {experiment.recipe.file}", then[:16], now[:16])


def show(run: str, found: Sequence[Difference]) -> None:
    """Print what differs."""
    if not found:
        print(f"Code, packages, data and host are as they were for {run}.")
        return
    print(f"Not as it was for {run}:")
    Console(highlight=False).print(_table(found))


def _table(found: Sequence[Difference]) -> Table:
    """A row for each difference; a kind is named in the first of its rows only."""
    kinds = ["", *(each.kind for each in found)]
    rows = [
        ("" if each.kind == kind_before else each.kind, each.what, each.then, each.now)
        for kind_before, each in zip(kinds, found, strict=False)
    ]
    return console_table(("kind", "what", "then", "now"), rows)


def _as_yaml_list(words: Sequence[str]) -> str:
    text: str = yaml.safe_dump(list(words))
    return text


def _options() -> argparse.Namespace:
    parser = Parser(
        prog="python -m sparse_exp.rerun",
        description="A past run once more, from its record; says first what is not as it was then.",
        epilog=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="directory of a run, or its MLflow id")
    add("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="values to change")
    add("--dry-run", action="store_true", help="only say what differs (also: dry_run=true)")
    add_place_options(parser, "uri", "store")
    return parser.parse_intermixed_args()


def data_differences(experiment: Experiment, then: str | None) -> Iterator[Difference]:
    """Whether the data set is another now; it is read where it is on this machine, never fetched.

    Args:
        experiment: names the data set.
        then: its digest; None: not recorded.
    """
    name, cache = f"digest of {experiment.dataset.name}", cache_directory(experiment.paths.cache)
    try:
        there = is_prepared(experiment.dataset, cache)
        now = prepare(experiment.dataset, cache).digest if there else "not on this machine yet"
    except SparseExpError as error:
        now = f"cannot be read: {error}"
    yield from difference("data", name, then, now)


if __name__ == "__main__":
    run_command(main)
