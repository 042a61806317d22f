"""``python -m sparse_exp.data``: convert and check data sets."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_exp.command import Parser, run_command
from sparse_exp.config.imgsz import in_words, parse_imgsz, sides
from sparse_exp.config.places import add_place_options, chosen_places
from sparse_exp.data.archives import open_tree
from sparse_exp.data.check import Report, inspect
from sparse_exp.data.convert import Converted, read_coco, read_voc, split_off, write_converted
from sparse_exp.errors import DataError, expected
from sparse_exp.files import as_json, expanded, landing_directory
from sparse_exp.hints import command_line
from sparse_exp.locks import exclusive
from sparse_exp.sources.cache import cache_directory
from sparse_exp.text import in_picture

_SHOWN = 10  # warnings of a kind; all errors are shown


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line; None: this process's.

    Returns:
        The exit code: 1 where ``check`` found errors, else 0.

    Raises:
        SparseExpError: the command cannot be carried out.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = _parser().parse_args(arguments)
    return check(options) if options.command == "check" else convert(options)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("python -m sparse_exp.data", description="Convert and check data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    checks = commands.add_parser(
        "check", help="report all that is wrong with a data set; exit code 1 on errors"
    )
    checks.add_argument("yaml", type=Path, help="data yaml in Ultralytics' format")
    checks.add_argument(
        "--imgsz",
        type=parse_imgsz,
        default=640,
        help="image size of the training, px: 640 (default), or 384,640 (height, width)",
    )
    checks.add_argument("--json", action="store_true", help="print everything as json")
    checks.add_argument("--all", action="store_true", help=f"list every warning, not {_SHOWN} of a kind")
    add_place_options(checks, "cache")
    converts = commands.add_parser("convert", help="write a data set in Ultralytics' format")
    converts.add_argument("format", choices=("coco", "voc"))
    converts.add_argument("source", type=Path, help="folder, zip or tar with annotations and images")
    converts.add_argument("dest", type=Path, help="folder of the new data set")
    converts.add_argument("--images", help="coco: folder inside SOURCE that file names start from")
    converts.add_argument(
        "--val-share", type=float, help="put this share of train into val; where there is no val"
    )
    converts.add_argument("--link", action="store_true", help="link to the images instead of copying them")
    converts.add_argument("--force", action="store_true", help="replace the data set that is in DEST")
    return parser


def check(options: argparse.Namespace) -> int:
    """Check a data set and print the report.

    Returns:
        The exit code: 1 where there are errors, else 0.

    Raises:
        DataError: an option or the data yaml is wrong.
    """
    cache = cache_directory(chosen_places(options).cache)
    report = inspect(expanded(options.yaml), options.imgsz, cache)
    if options.json:
        print(as_json(report.as_dict()))
    else:
        _show(report, everything=options.all)
    return 1 if report.errors else 0


def _show(report: Report, *, everything: bool) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(_split_table(report))
    console.print(_class_table(report))
    if report.saved and report.fitting != report.imgsz:
        size, side = in_words(report.fitting), max(sides(report.fitting))
        fit = f"Nearly all images fit {size} px (height, width) at the scale of a square of {side} px"
        do = f"set dataset.imgsz={size}, which saves {report.saved:.0%} of the work."
        console.print(f"\n{fit}: {do}", markup=False)
    for level, kind in dict.fromkeys((finding.level, finding.kind) for finding in report.findings):
        same = [finding for finding in report.findings if finding.kind == kind]
        colour = "red" if level == "error" else "yellow"
        console.print(f"\n[bold {colour}]{level}[/]: [bold]{kind}[/] ({len(same)})")
        shown = same if everything or level == "error" else same[:_SHOWN]
        for finding in shown:
            where = "" if finding.where in finding.message else f"{finding.where}: "
            console.print(f"  {where}{finding.message}", markup=False)
        if len(same) > len(shown):
            console.print(f"  ... and {len(same) - len(shown)} more (--all)")
    warnings = len(report.findings) - report.errors
    console.print(f"\n{report.path}: {report.errors} errors, {warnings} warnings", markup=False)


def _split_table(report: Report) -> Table:
    table = Table(title=f"Splits; sizes of boxes at {in_words(report.imgsz)} px", title_justify="left")
    table.add_column("")
    for split in report.splits:
        table.add_column(split, justify="right")
    facts = report.splits.values()
    table.add_row("images", *(f"{one.images}" for one in facts))
    table.add_row("  that cannot be used", *(f"{one.unusable}" for one in facts))
    table.add_row("  of background", *(f"{one.background}" for one in facts))
    table.add_row("  width by height", *(f"{one.narrowest:.2f} .. {one.widest:.2f}" for one in facts))
    table.add_row("boxes", *(f"{one.boxes}" for one in facts))
    table.add_row("  small, below 32 x 32 px", *(f"{one.small:.0%}" for one in facts))
    table.add_row("  medium, below 96 x 96 px", *(f"{one.medium:.0%}" for one in facts))
    table.add_row("  large", *(f"{one.large:.0%}" for one in facts))
    table.add_row("  with an anchor", *(f"{one.with_anchor:.1%}" for one in facts))
    table.add_row("  median side, px", *(f"{one.median_side:.0f}" for one in facts))
    return table


def _class_table(report: Report) -> Table:
    table = Table(title="Boxes by class", title_justify="left")
    for column in ("id", "class", *report.splits):
        table.add_column(column, justify="left" if column == "class" else "right")
    for class_id, name in enumerate(report.names):
        counts = (str(one.classes.get(class_id, 0)) for one in report.splits.values())
        table.add_row(str(class_id), Text(in_picture(name, 80)), *counts)
    return table


def convert(options: argparse.Namespace) -> int:
    """Convert a data set, and print the number of images and boxes taken and left out.

    Returns:
        The exit code: 0.

    Raises:
        DataError: an option or the source is wrong, or the data set cannot be written.
    """
    dest, source = expanded(options.dest), expanded(options.source)
    _require_apart(source.resolve(), dest.resolve())  # before a lock is made, which may lie in the source
    with _alone_at(dest):
        _check_convert_options(options, dest)
        converted = _convert(options, dest)
    _show_conversion(converted, dest)
    return 0


def _convert(options: argparse.Namespace, dest: Path) -> Converted:
    with open_tree([expanded(options.source)]) as tree:
        converted = read_coco(tree, options.images) if options.format == "coco" else read_voc(tree)
        if options.val_share is not None:
            split_off(converted, options.val_share)
        if not converted.images:
            raise DataError(
                expected(str(options.source), "at least one image with annotations", 0, "Correct it.")
            )
        try:
            with landing_directory(dest) as folder:
                write_converted(converted, tree, folder, link=options.link)
        except OSError as error:
            raise DataError(
                f"Cannot write {dest}: {error.strerror or error}. Nothing was written."
            ) from error
    return converted


@contextmanager
def _alone_at(dest: Path) -> Iterator[None]:
    """Be the only process that writes a data set there; it is put in its place as a whole."""
    with ExitStack() as stack:
        try:
            lock = dest.absolute().with_name(f".{dest.name}.lock")
            stack.enter_context(exclusive(lock, f"The data set {dest} is being written", wait=False))
        except OSError as error:
            raise DataError(f"Cannot write {dest}: {error.strerror}. Choose another folder.") from error
        yield


def _require_apart(source: Path, dest: Path) -> None:
    if source == dest or source in dest.parents or dest in source.parents:
        should_be = f"apart from {source}, neither inside nor around it"
        raise DataError(expected("DEST", should_be, str(dest), "Change it."))


def _check_convert_options(options: argparse.Namespace, dest: Path) -> None:
    if options.val_share is not None and not 0 < options.val_share < 1:
        raise DataError(expected("--val-share", "above 0 and below 1", options.val_share, "For example 0.2."))
    if options.link and not expanded(options.source).is_dir():
        raise DataError(f"--link needs a folder to link into, but {options.source} is none. Leave it out.")
    if dest.exists() and not options.force:
        raise DataError(f"{dest} exists. Choose another folder, or replace the data set in it with --force.")
    is_ours = dest.is_dir() and (not any(dest.iterdir()) or (dest / "data.yaml").is_file())
    if dest.exists() and not is_ours:
        raise DataError(f"{dest} holds no data.yaml, so it is no data set and is not replaced.")


def _show_conversion(converted: Converted, dest: Path) -> None:
    for split, images in converted.splits.items():
        print(f"{split}: {len(images)} images, {sum(map(len, images.values()))} boxes")
    for kind, count in sorted(converted.dropped.items()):
        if count:
            print(f"left out: {count} {kind}")
    print(f"Wrote {dest / 'data.yaml'} with {len(converted.names)} classes. Check it with")
    print(f"  {command_line('check', str(dest / 'data.yaml'), module='sparse_exp.data')}")
    for split in ("train", "val"):
        if not converted.splits.get(split):
            print(f"It has no {split} split, which a training needs. Convert again with --val-share 0.2.")


if __name__ == "__main__":
    run_command(main)
