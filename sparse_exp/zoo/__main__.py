"""The command ``python -m sparse_exp.zoo``: publish, list, show, search, verify and import models."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_exp.command import Parser, run_command
from sparse_exp.config.imgsz import in_words
from sparse_exp.config.places import add_place_options, chosen_places
from sparse_exp.errors import ConfigError, expected
from sparse_exp.files import as_json, expanded
from sparse_exp.hints import command_line
from sparse_exp.metrics.names import SIGNS
from sparse_exp.sources.cache import cache_directory
from sparse_exp.sources.local import (
    METADATA,
    Published,
    find,
    lacking,
    published,
    read_metadata,
    require_free,
    require_writable,
    stub_of,
)
from sparse_exp.sources.stub import STUB_PREFIX
from sparse_exp.zoo.publish import (
    AUTO,
    dataset_of,
    import_checkpoint,
    import_directory,
    publish_run,
    read_finished,
)
from sparse_exp.zoo.search import KEYS, find_models

_WIDE = 1000  # columns
_DESCRIPTION = "The local zoo: models that runs have published, to start from again."
_EPILOG = """examples:
  python -m sparse_exp.zoo publish outputs/runs/DATE/TIME-NAME
  python -m sparse_exp.zoo search "size=s sparsity>=0.7 quantized"
  python -m sparse_exp model=yolov5s model.weights=STUB

The zoo is --zoo, else $SPARSE_EXP_ZOO, else paths.zoo of the configuration. See docs/zoo.md."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; None: those of this process.

    Returns:
        The exit code: 1 where ``verify`` finds something.

    Raises:
        SparseExpError: what the user can put right, one line.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace, Path], int] = options.run
    return run(options, chosen_places(options).zoo)


def _parser() -> argparse.ArgumentParser:
    shared = Parser(add_help=False)
    add_place_options(shared, "zoo")
    parser = Parser(
        prog="python -m sparse_exp.zoo",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace, Path], int], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help, parents=[shared])
        command.set_defaults(run=run)
        return command

    _add_writing(add)
    _add_reading(add)
    return parser


def _add_writing(add: Callable[..., argparse.ArgumentParser]) -> None:
    command = add("publish", _publish, "put a finished run into the zoo")
    command.add_argument("source", metavar="RUN", type=Path, help="directory of a finished run")
    _add_target(command)
    command.add_argument("--cache", metavar="DIR", help="cache in which the run's data set is looked for")
    command = add("import", _import, "take over a checkpoint, or a directory in SparseZoo's layout")
    command.add_argument(
        "source", metavar="DIR|FILE", type=Path, help="directory, or .pt or .safetensors file"
    )
    _add_target(command)


def _add_target(command: argparse.ArgumentParser) -> None:
    command.add_argument("--as", dest="stub", metavar="STUB", help="publish under this stub (zoo:...)")
    command.add_argument("--force", action="store_true", help="replace a model that is published there")


def _add_reading(add: Callable[..., argparse.ArgumentParser]) -> None:
    _add_json(add("list", _list, "list all models"))
    command = add("show", _show, "show one model")
    command.add_argument("model", metavar="STUB|DIR")
    _add_json(command)
    command = add("search", _search, "find models by what they are")
    command.add_argument(
        "query",
        metavar="QUERY",
        nargs="*",
        help="terms between spaces or commas, all to be met: a word, or KEY OP VALUE with OP one of "
        f"{' '.join(SIGNS)}. "
        f"Keys: {', '.join(KEYS)}, and metrics in full or short, as for compare --best. "
        "Quote it: < and > mean something to the shell.",
    )
    _add_json(command)
    command = add("verify", _verify, "check hashes, zeros and sample outputs; exit code 1 if one differs")
    command.add_argument("models", metavar="STUB|DIR", nargs="*", help="default: all models")


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print what model.json says, as JSON")


def _publish(options: argparse.Namespace, zoo: Path) -> int:
    run = read_finished(options.source)
    require_writable(zoo)
    if options.stub and not options.force:
        require_free(options.stub, zoo)
    cache = chosen_places(options).cache or run.config["paths"]["cache"]
    dataset = dataset_of(run, cache_directory(cache))
    return _report(publish_run(run, zoo, stub=options.stub or AUTO, force=options.force, dataset=dataset))


def _import(options: argparse.Namespace, zoo: Path) -> int:
    source = expanded(options.source)
    if not source.exists():
        do = "Give a checkpoint file, or a directory in SparseZoo's layout."
        raise ConfigError(expected("what to import", "an existing path", str(source), do))
    require_writable(zoo)
    take = import_directory if source.is_dir() else import_checkpoint
    return _report(take(source, zoo, stub=options.stub, force=options.force))


def _report(model: Published) -> int:
    print(f"Published {model.stub}\nin {model.directory}")
    return 0


def _list(options: argparse.Namespace, zoo: Path) -> int:
    return _print(published(zoo), f"No model in {zoo}.", json=options.json)


def _search(options: argparse.Namespace, zoo: Path) -> int:
    found = find_models(" ".join(options.query), published(zoo))
    return _print(found, f"No model in {zoo} fits.", json=options.json)


def _print(models: list[Published], nothing: str, *, json: bool) -> int:
    if json:
        print(as_json([_as_data(model) for model in models]))
    elif not models:
        print(nothing)
    else:
        _print_table(models)
    return 0


def _as_data(model: Published) -> dict[str, Any]:
    return {**model.metadata, "stub": model.stub, "directory": str(model.directory)}


def _print_table(models: list[Published]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("size", "data set", "px", "zeros", "8 bit", "mAP50", "ONNX MB", "published"):
        numeric = column in ("px", "zeros", "mAP50", "ONNX MB")
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    table.add_column("stub", no_wrap=True)
    for model in models:
        table.add_row(*map(Text, _row(model)))  # in which brackets are no markup
    console = Console()
    console.width = max(console.width, _WIDE)  # a stub is there to be copied: it is never cut
    console.print(table)


def _row(model: Published) -> list[str]:
    info = model.metadata
    numbers = [info["metrics"].get(key) for key in ("val/map50", "size/onnx_gzip_mb")]
    map50, megabytes = (f"{number:.3g}" if isinstance(number, int | float) else "" for number in numbers)
    quantized, day = "yes" if info["quantized"] else "no", str(info["published"])[:10]
    texts = [info["size"], info["dataset"], in_words(info.get("imgsz") or ""), f"{info['sparsity']:.1%}"]
    return [*map(str, texts), quantized, map50, megabytes, day, model.stub]


def _show(options: argparse.Namespace, zoo: Path) -> int:
    model = _model(options.model, zoo)
    if options.json:
        print(as_json(_as_data(model)))
        return 0
    info, size = model.metadata, in_words(model.metadata.get("imgsz") or "?")
    lines = {
        "stub": model.stub,
        "short": info["short"],
        "directory": str(model.directory),
        "model": f"YOLOv5{info['size']}, {len(info['classes'])} classes, {size} px",
        "zeros": f"{info['sparsity']:.2%}" + (" in blocks of 4" if info["block4"] else ""),
        "8 bit": "yes" if info["quantized"] else "no",
        "recipe": info["recipe"],
        "origin": info.get("origin", ""),
        "published": f"{info['published']} by {info['by']}",
        "licence": " ".join(map(str, info.get("licence") or [])),
    }
    lines |= {
        name: f"{value:.4g}" for name, value in info["metrics"].items() if isinstance(value, int | float)
    }
    width = max(map(len, lines))
    print("\n".join(f"{label:<{width}}  {text}" for label, text in lines.items() if text))
    return 0


def _model(name: str, zoo: Path) -> Published:
    directory = find(name, zoo) if name.startswith(STUB_PREFIX) else expanded(name).absolute()
    metadata = read_metadata(directory) if directory else {}
    if directory is None or not metadata:
        do = f"See: {command_line('list', '--zoo', str(zoo), module='sparse_exp.zoo')}"
        raise ConfigError(expected("the model", f"one that is published in {zoo}", name, do))
    if missing := lacking(metadata):
        do = "It is damaged: publish or import the model again with --force."
        raise ConfigError(f"{directory / METADATA} lacks {', '.join(missing)}. {do}")
    inside = directory.is_relative_to(zoo)
    return Published(stub_of(directory, zoo) if inside else metadata["stub"], directory, metadata)


def _verify(options: argparse.Namespace, zoo: Path) -> int:
    models = [_model(name, zoo) for name in options.models] if options.models else published(zoo)
    if not models:
        print(f"No model in {zoo}.")
        return 0
    from sparse_exp.zoo.verify import verify

    wrong = 0
    for model in models:
        problems = list(verify(model.directory))
        wrong += bool(problems)
        print(f"{'differs' if problems else 'good':<8}{model.stub}")
        for problem in problems:
            print(f"        {problem}")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_command(main)
