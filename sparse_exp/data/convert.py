"""From COCO json and Pascal VOC to Ultralytics' format."""

from __future__ import annotations

import os
import random
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sparse_exp.data.archives import Tree
from sparse_exp.data.images import IMAGE_SUFFIXES, Box, Frame, read_frame
from sparse_exp.data.voc import VocAnnotation, read_annotation
from sparse_exp.data.writing import write_yaml
from sparse_exp.errors import DataError, expected
from sparse_exp.files import parse_json
from sparse_exp.progress import progress

Row = tuple[int, float, float, float, float]
_SMALLEST = 1e-5  # of the image's side; less would be written as 0
_SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


@dataclass
class Converted:
    """What a data set in another format holds.

    Attributes:
        names: class names; the class id is the position.
        splits: by split and name of an image in the tree: class id and x, y, w, h of each box,
            centre and size as shares of the image.
        dropped: how many things of each kind were left out.
    """

    names: tuple[str, ...]
    splits: dict[str, dict[str, list[Row]]]
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def images(self) -> int:
        """Number of images."""
        return sum(map(len, self.splits.values()))

    @property
    def boxes(self) -> int:
        """Number of boxes."""
        return sum(len(rows) for images in self.splits.values() for rows in images.values())


def write_converted(converted: Converted, tree: Tree, folder: Path, *, link: bool = False) -> None:
    """Write a data set in Ultralytics' format.

    Args:
        converted: what to write.
        tree: where its images come from.
        folder: an empty directory.
        link: make hard links to images, or symbolic ones on another disk, instead of copies; only
            of a tree that is a folder.
    """
    with progress("Writing images", total=converted.images, unit="images") as bar:
        for split, images in converted.splits.items():
            taken: set[str] = set()
            for kind in ("images", "labels"):
                (folder / kind / split).mkdir(parents=True)
            for name, rows in images.items():
                stem, suffix = _free_stem(PurePosixPath(name), taken), PurePosixPath(name).suffix.lower()
                _put(tree, name, folder / "images" / split / f"{stem}{suffix}", link=link)
                lines = ("{} {:.6f} {:.6f} {:.6f} {:.6f}\n".format(*row) for row in rows)
                (folder / "labels" / split / f"{stem}.txt").write_text("".join(lines), encoding="utf-8")
                bar.advance()
    write_yaml(folder, converted.names, list(converted.splits))


def _free_stem(name: PurePosixPath, taken: set[str]) -> str:
    """A stem that no image of the split has yet; upper and lower case count as the same."""
    stem, number = name.stem, 1
    while stem.lower() in taken:
        number += 1
        stem = f"{name.stem}_{number}"
    taken.add(stem.lower())
    return stem


def _put(tree: Tree, name: str, place: Path, *, link: bool) -> None:
    if tree.folder is None:
        place.write_bytes(tree.read(name))
        return
    source = (tree.folder / name).resolve()
    if not link:
        shutil.copyfile(source, place)
        return
    try:
        os.link(source, place)
    except OSError:  # another disk, or a file system without hard links
        place.symlink_to(source)


def split_off(converted: Converted, share: float) -> None:
    """Move a share of the training images into ``val``, the same ones every time.

    Args:
        converted: changed in place; has no ``val`` yet.
        share: above 0 and below 1; at least one image moves.

    Raises:
        DataError: there is a ``val``, or fewer than two images.
    """
    train = converted.splits.get("train", {})
    if converted.splits.get("val") or len(train) < 2:
        has = "a val split" if converted.splits.get("val") else f"{len(train)} training images"
        raise DataError(f"--val-share cannot be used: the data set has {has}. Leave it out.")
    count = min(max(1, round(len(train) * share)), len(train) - 1)
    moved = set(random.Random(0).sample(sorted(train), count))
    converted.splits = {
        "train": {name: rows for name, rows in train.items() if name not in moved},
        "val": {name: rows for name, rows in train.items() if name in moved},
        **{split: images for split, images in converted.splits.items() if split != "train" and images},
    }


def _row(class_id: int, box: Box, size: tuple[float, float]) -> Row | None:
    """A box in pixels (x1, y1, x2, y2) as a row of a label file; None where nothing is inside the image."""
    width, height = size
    x1, x2 = (min(max(edge / width, 0.0), 1.0) for edge in box[::2])
    y1, y2 = (min(max(edge / height, 0.0), 1.0) for edge in box[1::2])
    w, h = x2 - x1, y2 - y1
    # Edges may be NaN, which is above nothing: such a box is left out, too.
    return (class_id, x1 + w / 2, y1 + h / 2, w, h) if w > _SMALLEST and h > _SMALLEST else None


def _split_of(path: PurePosixPath) -> str:
    """The split that a path names: train for ``instances_train2017.json``, val for ``valid/x.xml``."""
    return _named_split(path) or "train"


def _named_split(path: PurePosixPath) -> str | None:
    for part in reversed(path.parts):
        for word in part.lower().replace("-", "_").replace(".", "_").split("_"):
            split = _SPLIT_WORDS.get(word.rstrip("0123456789"))
            if split:
                return split
    return None


class _Canvas(NamedTuple):
    """What the boxes of an image are drawn on.

    Attributes:
        frame: that of the image; of one that boxes refer to as it is stored, they are turned with it.
        size: width and height that they are shares of, in their pixels.
    """

    frame: Frame
    size: tuple[float, float]

    def row(self, class_id: int, box: Box) -> Row | None:
        """See `_row`."""
        return _row(class_id, self.frame.turned(box), self.size)


def _canvas(tree: Tree, name: str, declared: tuple[float, float]) -> _Canvas:
    """What the boxes of an image are drawn on, given its size as the annotations say it; 0 where they do not.

    Of a photo that its camera has turned, some tools show what is stored, others the upright image: the size
    tells which, also where the image was scaled since. Without one, or with the sides of an upright image
    swapped, it is the upright image. Any other size is that of the image before it was scaled.
    """
    try:
        frame = read_frame(tree.folder / name) if tree.folder else read_frame(Path(name), tree.read(name))
    except DataError:
        if not all(declared):
            raise
        return _Canvas(Frame((0, 0)), declared)
    upright, swapped = frame.upright, frame.upright[::-1]
    (width, height), (stored_width, stored_height) = declared, frame.stored
    like_stored = abs(width * stored_height - height * stored_width) <= max(frame.stored)  # within a pixel
    if frame.orientation != 1 and upright != frame.stored and all(declared) and like_stored:
        drawn = Frame((round(width), round(height)), frame.orientation)
        return _Canvas(drawn, drawn.upright)
    keeps = all(declared) and declared != swapped
    return _Canvas(Frame((0, 0)), declared if keeps else upright)


# COCO: https://cocodataset.org/#format-data


def read_coco(tree: Tree, images: str | None = None) -> Converted:
    """Read detection annotations in COCO's json format.

    Files ``instances_*.json`` count, or else every json with images and annotations. The name of a
    file or of its folder says the split. Boxes of crowds are left out, others clipped to their
    image. Class ids count from 0 in the order of the category ids.

    Args:
        tree: holds the json files and the images.
        images: folder in the tree that file names start from; None: they are looked for.

    Raises:
        DataError: there are no such annotations, or they are damaged.
    """
    files = sorted(name for name in tree.readers if name.endswith(".json"))
    files = [name for name in files if PurePosixPath(name).name.startswith("instances_")] or files
    parts = [(name, part) for name in files if (part := _load_coco(tree, name)) is not None]
    if not parts:
        raise DataError(
            expected(tree.place, "COCO annotations (json with images, annotations)", files, "Correct it.")
        )
    categories = _categories(parts)
    converted = Converted(tuple(categories.values()), {})
    positions = {category: position for position, category in enumerate(categories)}
    folders = {name: _coco_folders(PurePosixPath(name), images) for name, _ in parts}
    finder = _ImageFinder(tree, folders.values())
    for name, part in parts:
        rows = converted.splits.setdefault(_split_of(PurePosixPath(name)), {})
        try:
            path = PurePosixPath(name)
            _read_coco_part(tree, finder, path, folders[name], part, positions, rows, converted.dropped)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(
                f"Cannot read {name} in {tree.place} as COCO json: {reason}. Correct it."
            ) from error
    return converted


def _load_coco(tree: Tree, name: str) -> dict[str, Any] | None:
    try:
        part = parse_json(tree.read(name))
    except ValueError as error:
        raise DataError(f"Cannot read {name} in {tree.place}: {error}. Correct it.") from error
    wanted = {"images", "annotations", "categories"}
    return part if isinstance(part, dict) and wanted <= set(part) else None


def _categories(parts: Sequence[tuple[str, dict[str, Any]]]) -> dict[int, str]:
    """Category names by their id, in the order of ids."""
    names: dict[int, str] = {}
    for file, part in parts:
        for category in part["categories"]:
            name = names.setdefault(int(category["id"]), str(category["name"]))
            if name != str(category["name"]):
                what = f"category {category['id']} of {file}"
                raise DataError(expected(what, repr(name), category["name"], "Correct the categories."))
    return dict(sorted(names.items()))


class _ImageFinder:
    """Finds images of a tree by their file names.

    Args:
        tree: holds the images.
        folders: of the images of each annotation file. What is missing in those of one file is not taken from
            those of another, nor from below them, where an image of that name is another image.
    """

    def __init__(self, tree: Tree, folders: Iterable[Iterable[PurePosixPath]]) -> None:
        self._names = tree.readers
        self._claimed = {_normal(folder) for one in folders for folder in one}
        self._by_name: dict[str, list[str]] = {}
        for name in sorted(tree.readers):
            if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
                self._by_name.setdefault(_composed(PurePosixPath(name).name), []).append(name)

    def find(self, file_name: str, folders: Sequence[PurePosixPath], split: str | None) -> str | None:
        """The image in the first of the folders that has it, or else the only one that it can be."""
        found = self.inside(file_name, folders) or self.others(file_name, folders, split)
        return found[0] if len(found) == 1 else None

    def inside(self, file_name: str, folders: Sequence[PurePosixPath]) -> list[str]:
        """The image in the first of the folders that has it, if one has."""
        names = [name for folder in folders if (name := _normal(folder / file_name)) in self._names]
        return [name for name in names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES][:1]

    def others(self, file_name: str, folders: Sequence[PurePosixPath], split: str | None) -> list[str]:
        """Images that a file name can mean elsewhere than in its own folders.

        Args:
            file_name: as the annotations have it; a path in front of the name counts.
            folders: of the annotations' own images.
            split: that the annotations' path names; images whose path names another are not theirs.
        """
        own, wanted = {_normal(folder) for folder in folders}, _composed(file_name.replace("\\", "/"))
        return [
            name
            for name in self._by_name.get(PurePosixPath(wanted).name, [])
            if f"/{_composed(name)}".endswith(f"/{wanted}")
            and (split is None or _named_split(PurePosixPath(name).parent) in (None, split))
            and self._claimant(_above(name, wanted)) not in self._claimed - own
        ]

    def _claimant(self, folder: str) -> str | None:
        """The nearest folder, from one upwards, that annotations have for theirs."""
        upwards = (PurePosixPath(folder), *PurePosixPath(folder).parents)
        return next((name for path in upwards if (name := _normal(path)) in self._claimed), None)


def _missing(*, several: bool) -> str:
    """What is said of an image that was not found."""
    return "images that several have the name of" if several else "images not found"


def _normal(path: PurePosixPath) -> str:
    return os.path.normpath(path).replace("\\", "/")


def _above(name: str, end: str) -> str:
    """The folder of ``name`` that the path ``end`` starts at."""
    return _normal(PurePosixPath(*PurePosixPath(name).parts[: -len(PurePosixPath(end).parts)]))


def _composed(name: str) -> str:
    """A name with accents as part of their letters; macOS stores them apart."""
    return unicodedata.normalize("NFC", name)


def _coco_folders(path: PurePosixPath, images: str | None) -> list[PurePosixPath]:
    """Where the images of an annotation file are looked for, ``images`` alone where it is given."""
    tag = path.stem.removeprefix("instances_")  # train2017
    above = path.parent.parent
    usual = [path.parent, above / tag, above / "images" / tag, above / "images", above]
    return [PurePosixPath(images)] if images else usual


def _read_coco_part(
    tree: Tree, finder: _ImageFinder, path: PurePosixPath, folders: Sequence[PurePosixPath],
    part: Mapping[str, Any], positions: Mapping[int, int], rows: dict[str, list[Row]],
    dropped: Counter[str],
) -> None:  # fmt: skip
    found: dict[Any, tuple[str, _Canvas]] = {}
    files: dict[Any, str] = {}
    for image in part["images"]:
        if files.setdefault(image["id"], str(image["file_name"])) != str(image["file_name"]):
            raise ValueError(f"two images have the id {image['id']}, such as {image['file_name']}")
        place = str(image["file_name"]), folders, _named_split(path)
        name = finder.find(*place)
        if name is None:
            dropped[_missing(several=len(finder.others(*place)) > 1)] += 1
            continue
        dropped["images listed twice"] += name in rows
        rows.setdefault(name, [])
        size = (float(image.get("width") or 0), float(image.get("height") or 0))
        found[image["id"]] = (name, _canvas(tree, name, size))
    for annotation in part["annotations"]:
        _add_coco_box(annotation, found, positions, rows, dropped)


def _add_coco_box(
    annotation: Mapping[str, Any], found: Mapping[Any, tuple[str, _Canvas]],
    positions: Mapping[int, int], rows: dict[str, list[Row]], dropped: Counter[str],
) -> None:  # fmt: skip
    if annotation.get("iscrowd"):
        dropped["boxes of crowds"] += 1
        return
    if annotation["image_id"] not in found:
        dropped["boxes without an image"] += 1
        return
    name, canvas = found[annotation["image_id"]]
    x, y, w, h = map(float, annotation["bbox"])
    row = canvas.row(positions[int(annotation["category_id"])], (x, y, x + w, y + h))
    if row is None:
        dropped["empty boxes"] += 1
    elif row in rows[name]:
        dropped["boxes listed twice"] += 1
    else:
        rows[name].append(row)


# Pascal VOC: http://host.robots.ox.ac.uk/pascal/VOC/voc2007/htmldoc/


def read_voc(tree: Tree, sets: Mapping[str, Sequence[str]] | None = None) -> Converted:
    """Read Pascal VOC annotations: ``Annotations/*.xml`` and ``JPEGImages``, or xml beside images.

    Pixels count from 1 there and the last one is inside, so a box reaches from ``xmin - 1`` to
    ``xmax``. Objects marked as difficult are left out, as YOLOv5 does. Classes are sorted by name.

    Args:
        tree: holds one or several such data sets.
        sets: by split, the image sets that make it up, such as ``VOC2007/trainval``; None: the sets
            called train (or else trainval, or else everything), val and test.

    Raises:
        DataError: there are no such annotations, they are damaged, or a set is missing.
    """
    xmls = {name for name in tree.readers if name.endswith(".xml")}
    if not xmls:
        raise DataError(
            expected(tree.place, "a data set with Annotations/*.xml", "none", "Correct the path.")
        )
    chosen = {
        split: [(name, _read_voc_xml(tree, name)) for name in names]
        for split, names in _voc_splits(tree, xmls, sets).items()
        if names
    }
    items = (item for parts in chosen.values() for _, part in parts for item in part.objects)
    names = tuple(sorted({item.name for item in items if not item.difficult}))
    converted, finder = Converted(names, {}), _ImageFinder(tree, map(_voc_folders, map(PurePosixPath, xmls)))
    own = {name: _image_of(finder, PurePosixPath(name)) for name in sorted(xmls)}
    named = {
        name: _named_image(finder, PurePosixPath(name), part.file_name, own)
        for parts in chosen.values()
        for name, part in parts
        if own[name] is None
    }
    claims = Counter(named.values())
    for split, parts in chosen.items():
        rows = converted.splits.setdefault(split, {})
        for name, part in parts:
            image = own[name] or named[name]
            if own[name] is None and image is not None and claims[image] > 1:
                converted.dropped["annotations that name an image as others do"] += 1
            elif image is None:
                converted.dropped[_missing(several=len(_elsewhere(finder, PurePosixPath(name))) > 1)] += 1
            else:
                _add_voc_image(tree, image, part, rows, converted)
    return converted


def _voc_folders(path: PurePosixPath) -> list[PurePosixPath]:
    return [path.parent.parent / "JPEGImages", path.parent, path.parent.parent / "images"]


def _image_of(finder: _ImageFinder, path: PurePosixPath) -> str | None:
    """The image of an annotation file: the one of its name."""
    inside = [name for file in _voc_files(path) for name in finder.inside(file, _voc_folders(path))]
    found = inside[:1] or _elsewhere(finder, path)
    return found[0] if len(found) == 1 else None


def _voc_files(path: PurePosixPath) -> list[str]:
    """What the image of an annotation file may be called; cameras write suffixes in capitals."""
    suffixes = (".jpg", *sorted(IMAGE_SUFFIXES - {".jpg"}))
    return [f"{path.stem}{form}" for suffix in suffixes for form in (suffix, suffix.upper(), suffix.title())]


def _elsewhere(finder: _ImageFinder, path: PurePosixPath) -> list[str]:
    """Images that could be that of an annotation file, in none of its own folders."""
    place = _voc_folders(path), _named_split(path.parent)
    return [name for file in _voc_files(path) for name in finder.others(file, *place)]


def _named_image(
    finder: _ImageFinder, path: PurePosixPath, file_name: str, own: Mapping[str, str | None]
) -> str | None:
    """The image that an annotation file names, where none has its name; no image with its own annotations."""
    split = _named_split(path.parent)
    found = finder.find(file_name, _voc_folders(path), split) if file_name else None
    return None if found in own.values() else found


def _read_voc_xml(tree: Tree, name: str) -> VocAnnotation:
    try:
        return read_annotation(tree.read(name))
    except ValueError as error:
        raise DataError(f"Cannot read {name} in {tree.place}: {error}. Correct or remove it.") from error


def _add_voc_image(
    tree: Tree, name: str, part: VocAnnotation, rows: dict[str, list[Row]], converted: Converted
) -> None:
    kept = rows.setdefault(name, [])
    canvas = _canvas(tree, name, part.size)
    for item in part.objects:
        x1, y1, x2, y2 = item.box
        box = (x1 - 1, y1 - 1, x2, y2)
        row = None if item.difficult else canvas.row(converted.names.index(item.name), box)
        if row is None:
            converted.dropped["difficult objects" if item.difficult else "empty boxes"] += 1
        elif row in kept:
            converted.dropped["boxes listed twice"] += 1
        else:
            kept.append(row)


def _voc_splits(
    tree: Tree, xmls: set[str], sets: Mapping[str, Sequence[str]] | None
) -> dict[str, list[str]]:  # fmt: skip
    """The annotation files of each split."""
    if sets is not None:
        return {
            split: [xml for one in wanted for xml in _voc_set(tree, xmls, one)]
            for split, wanted in sets.items()
        }
    listed = {"train": "train", "val": "val", "test": "test"}
    by_list = {split: list(_sets_called(tree, xmls, name)) for split, name in listed.items()}
    if not by_list["train"]:
        by_list["train"] = [
            xml for xml in _sets_called(tree, xmls, "trainval") if xml not in set(by_list["val"])
        ]
    if any(by_list.values()):
        return by_list
    by_folder: dict[str, list[str]] = {}
    for xml in sorted(xmls):
        by_folder.setdefault(_split_of(PurePosixPath(xml).parent), []).append(xml)
    return by_folder


def _sets_called(tree: Tree, xmls: set[str], name: str) -> Iterator[str]:
    ending = f"ImageSets/Main/{name}.txt"
    for listing in sorted(file for file in tree.readers if file.endswith(ending)):
        yield from _annotations_in(tree, xmls, listing)


def _voc_set(tree: Tree, xmls: set[str], wanted: str) -> Iterator[str]:
    year, _, name = wanted.partition("/")
    listing = next(
        (file for file in tree.readers if file.endswith(f"{year}/ImageSets/Main/{name}.txt")), None
    )
    if listing is None:
        do = "Give the archives that the configuration names."
        raise DataError(f"{tree.place} has no image set {name} of {year}. {do}")
    yield from _annotations_in(tree, xmls, listing)


def _annotations_in(tree: Tree, xmls: set[str], listing: str) -> Iterator[str]:
    root = PurePosixPath(listing).parents[2]
    for line in tree.read(listing).decode("utf-8-sig").splitlines():
        words = line.split()
        xml = str(root / "Annotations" / f"{words[0]}.xml") if words else ""
        if xml in xmls:
            yield xml
