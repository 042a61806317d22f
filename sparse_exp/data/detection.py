"""Detection data in Ultralytics' format, the only format that training, evaluation and prediction read.

A data set is a yaml file with the keys ``path`` (its root; by default the yaml's own folder), ``train``,
``val``, optionally ``test`` (each a folder, a text file that lists images, or a list of these) and ``names``
(a list, or a map from class id to name). Other keys are ignored; above all, ``download`` is never run.

The label file of ``.../images/x.jpg`` is ``.../labels/x.txt``. It has one line ``class x y w h`` per box:
centre and size as shares of the image's width and height. A polygon ``class x1 y1 x2 y2 ...`` becomes the box
around it; with ``kpt_shape: [count, numbers]`` in the yaml, keypoints follow each box and are left out; with
``kpt_shape: null`` none do, where lines could be either. An image whose label file is empty or missing shows
background.
"""

from __future__ import annotations

import hashlib
import logging
import os
from codecs import BOM_UTF8
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from sparse_exp.bounded_yaml import read_yaml
from sparse_exp.config.imgsz import Imgsz
from sparse_exp.data.images import IMAGE_SUFFIXES
from sparse_exp.data.labels import not_told_apart, read_boxes
from sparse_exp.data.letterbox import fitted_size
from sparse_exp.data.scan import EMPTY, Scan, scan_files
from sparse_exp.errors import DataError, expected
from sparse_exp.files import expanded
from sparse_exp.hints import command_line
from sparse_exp.text import whole_text

_log = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")
_LISTED = 3  # unusable files that a warning lists; it only counts the others


class Sample(NamedTuple):
    """One image and its label file.

    Attributes:
        image: path of the image.
        label: path of the label file, which need not exist.
        boxes: the boxes in it, float32 ``(M, 5)`` as bytes; None where it has not been read.
        keypoints: how many numbers of keypoints may follow a box in the file; 0: none; None: that is
            not said.
        size: width and height of the upright image, px; None where it has not been read.
    """

    image: Path
    label: Path
    boxes: bytes | None = None
    keypoints: int | None = None
    size: tuple[int, int] | None = None

    def labels_of(self, num_classes: int) -> NDArray[np.float32]:
        """Class id and x, y, w, h of each box; arguments, result and errors as of `read_boxes`."""
        if self.boxes is None:
            return read_boxes(self.label, num_classes, self.keypoints)
        return np.frombuffer(self.boxes, np.float32).reshape(-1, 5)


def evenly_spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Samples that are spread evenly over a split, the first and the last among them.

    Args:
        samples: the split.
        count: how many; where the split has fewer, all of them.
    """
    positions = np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(int)
    return [samples[position] for position in positions]


@dataclass(frozen=True)
class DetectionDataset:
    """A detection data set on disk; all its images and labels have been checked.

    Attributes:
        name: shown to users.
        root: directory from which relative paths in the yaml start.
        names: class names; a class id is an index into them.
        splits: samples of ``train``, ``val`` and, if there is one, ``test``, sorted by path.
        digest: SHA-256 of class names, splits, relative paths and file contents, 64 hex digits.
        skipped: number of images left out because they or their labels cannot be used.
    """

    name: str
    root: Path
    names: tuple[str, ...]
    splits: dict[str, tuple[Sample, ...]]
    digest: str
    skipped: int = 0


@dataclass(frozen=True)
class Listing:
    """The content of a data yaml; its images and labels have not been checked.

    Attributes:
        path: of the data yaml.
        root: see `DetectionDataset`.
        names: see `DetectionDataset`.
        splits: samples by split; some may not exist.
        missing: for each image that does not exist, ``file:line`` of the list that names it.
        keypoints: how many numbers of keypoints may follow a box in a label file; 0: none; None: that is
            not said.
    """

    path: Path
    root: Path
    names: tuple[str, ...]
    splits: dict[str, tuple[Sample, ...]]
    missing: dict[Path, str]
    keypoints: int | None = None


def load_dataset(
    yaml_path: Path, name: str | None = None, *, cache: Path | None = None, on_corrupt: str = "fail"
) -> DetectionDataset:
    """Read a data yaml, and check every image and label.

    Args:
        yaml_path: the data yaml.
        name: name of the data set; None: the yaml's stem.
        cache: cache directory, which keeps the results of the checks; None: they are not kept.
        on_corrupt: ``fail``: refuse the data set; ``skip``: leave out images that cannot be used, or whose
            labels cannot. Which ones those are depends only on the files, and so does the digest.

    Raises:
        DataError: the yaml is missing or wrong, the path of a split does not exist, or a split holds no image
            or no box; or files cannot be used and are not skipped (names the first and their number).
    """
    listing = list_dataset(yaml_path)
    scans = scan_listing(listing, cache)
    if unclear := unclear_lines(listing, scans):
        raise DataError(unclear[1])
    corrupt = [image for image in scans if image not in listing.missing and scans[image].problems]
    corrupt = [*listing.missing, *corrupt]
    if corrupt:
        _refuse_or_warn(listing, scans, corrupt, on_corrupt)
    skipped = set(corrupt)
    splits = {
        split: tuple(_scanned(s, scans[s.image]) for s in samples if s.image not in skipped)
        for split, samples in listing.splits.items()
    }
    _require_images(splits, yaml_path)
    for split, samples in splits.items():
        if problem := without_boxes(split, samples, scans):
            raise DataError(f"{problem} {advice_of(listing)}")
    _warn(listing, splits, scans)
    digest = _digest(listing.root, listing.names, splits, scans)
    return DetectionDataset(
        name or yaml_path.stem, listing.root, listing.names, splits, digest, skipped=len(corrupt)
    )


def _scanned(sample: Sample, scan: Scan) -> Sample:
    return sample._replace(boxes=scan.boxes, size=(scan.width, scan.height))


def box_sides(samples: Iterable[Sample], imgsz: Imgsz) -> NDArray[np.float32]:
    """Width and height (M, 2) in px of all boxes of scanned samples, once images fit ``imgsz``."""
    scaled = [
        np.frombuffer(sample.boxes or b"", np.float32).reshape(-1, 5)[:, 3:]
        * np.array(fitted_size(*sample.size, imgsz), np.float32)
        for sample in samples
        if sample.size
    ]
    return np.concatenate([np.zeros((0, 2), np.float32), *scaled])


def check_dataset(dataset: DetectionDataset) -> dict[str, int]:
    """Number of boxes in each split."""
    classes = len(dataset.names)
    return {
        split: sum(len(sample.labels_of(classes)) for sample in samples)
        for split, samples in dataset.splits.items()
    }


def list_dataset(yaml_path: Path) -> Listing:
    """Read a data yaml and list its samples; images and labels are not opened.

    Raises:
        DataError: the yaml is missing or wrong, the path of a split does not exist, or a split is empty.
    """
    spec = _read_yaml(yaml_path)
    names, keypoints = _read_names(spec, yaml_path), _read_keypoints(spec, yaml_path)
    missing: dict[Path, str] = {}
    labels = _Labels()
    try:
        root, hint = _find_root(spec, yaml_path)
        splits = {
            split: tuple(
                Sample(image, labels.of(image), keypoints=keypoints)
                for image in _images_of(split, spec[split], root, hint, yaml_path, missing)
            )
            for split in SPLITS
            if spec.get(split)
        }
    except OSError as error:
        raise DataError(f"Cannot read what {yaml_path} names: {error}. Correct or allow it.") from error
    _require_images(splits, yaml_path)
    return Listing(yaml_path, root, names, splits, missing, keypoints)


def scan_listing(listing: Listing, cache: Path | None = None) -> dict[Path, Scan]:
    """Scan every file of a data set, each image once; see `sparse_exp.data.scan.scan_files`."""
    key = hashlib.sha256(os.fsencode(listing.path.resolve())).hexdigest()[:20]
    place = cache / "scans" / f"{key}.json" if cache else None
    pairs = ((sample.image, sample.label) for samples in listing.splits.values() for sample in samples)
    return scan_files(pairs, len(listing.names), place, listing.keypoints)


def problems_of(image: Path, listing: Listing, scans: Mapping[Path, Scan]) -> list[tuple[str, str]]:
    """Why an image cannot be used: for each problem the file or ``file:line``, and a message naming it."""
    if image in listing.missing:
        where, do = listing.missing[image], "Correct or remove the line."
        return [(where, expected(f"the image of {where}", "an existing file", str(image), do))]
    return list(scans[image].problems)


def unclear_lines(listing: Listing, scans: Mapping[Path, Scan]) -> tuple[str, str] | None:
    """See `sparse_exp.data.labels.not_told_apart`."""
    labels = {s.label: scans[s.image].longer for samples in listing.splits.values() for s in samples}
    return not_told_apart(labels.items())


def without_boxes(split: str, samples: Sequence[Sample], scans: Mapping[Path, Scan]) -> str:
    """What is wrong with a split in which no image has a box; "" where one has.

    Args:
        split: its name.
        samples: its images that can be used, at least one.
        scans: of these images.
    """
    if any(scans[sample.image].boxes for sample in samples):
        return ""
    bare = next((sample for sample in samples if not scans[sample.image].has_label), samples[0])
    text = f"No image of {split} has a box. Label files are expected at paths like {bare.label}."
    return f"{text}{_or_leave_out(split)}"


def shared_images(
    splits: Mapping[str, Sequence[Sample]], scans: Mapping[Path, Scan]
) -> Iterator[tuple[str, Path, str, Path]]:
    """Images whose content an earlier split has, too; not of a split that is part of ``train`` as a whole.

    Yields:
        The split and path of the image; the split and path of the same image in the earlier split.
    """
    trained = {sample.image for sample in splits["train"]}
    first: dict[str, tuple[str, Path]] = {}
    for split, samples in splits.items():
        if split != "train" and trained.issuperset(sample.image for sample in samples):
            continue
        for sample in samples:
            sha256 = scans[sample.image].image_sha256
            seen_in, other = first.setdefault(sha256, (split, sample.image))
            if sha256 != EMPTY and seen_in != split:
                yield split, sample.image, seen_in, other


def shared_labels(splits: Mapping[str, Sequence[Sample]]) -> Iterator[tuple[Path, Path, Path]]:
    """Images whose label file is that of another image of the same name, such as a.png and a.jpg.

    Yields:
        The image, the other one, and the label file.
    """
    first: dict[Path, Path] = {}
    for sample in dict.fromkeys(sample for samples in splits.values() for sample in samples):
        other = first.setdefault(sample.label, sample.image)
        if other != sample.image:
            yield sample.image, other, sample.label


def repeated_names(names: Sequence[str]) -> dict[str, list[int]]:
    """The class names that several classes have, and the ids of these."""
    ids = defaultdict[str, list[int]](list)
    for number, name in enumerate(names):
        ids[name].append(number)
    return {name: numbers for name, numbers in ids.items() if len(numbers) > 1}


def unlearnable_classes(
    names: Sequence[str], splits: Mapping[str, Sequence[Sample]], scans: Mapping[Path, Scan]
) -> dict[int, list[str]]:
    """Ids of classes that have boxes, but none in ``train``, and the splits where they have some."""
    found = {
        split: {int(row[0]) for sample in samples for row in boxes_of(scans[sample.image])}
        for split, samples in splits.items()
    }
    wanted = set().union(*found.values()) - found["train"]
    return {
        number: [s for s in found if number in found[s]] for number in range(len(names)) if number in wanted
    }


def boxes_of(scan: Scan) -> NDArray[np.float32]:
    """Class id and x, y, w, h of each box of an image, float32 ``(M, 5)``."""
    return np.frombuffer(scan.boxes, np.float32).reshape(-1, 5)


def advice_of(listing: Listing) -> str:
    """The sentence that tells how to see all that is wrong with a data set."""
    return f"All that is wrong: {command_line('check', str(listing.path), module='sparse_exp.data')}"


def _warn(listing: Listing, splits: Mapping[str, Sequence[Sample]], scans: Mapping[Path, Scan]) -> None:
    """Say in one line what is odd and changes the training or what is measured."""
    repeated = sum(scans[sample.image].repeated for samples in splits.values() for sample in samples)
    found = [f"{repeated} boxes stand in a label file twice and count once"] if repeated else []
    if shared := list(shared_images(splits, scans)):
        split, image, other, _ = shared[0]
        found.append(f"{len(shared)} images are in two splits, such as {image} in {other} and {split}")
    if labels := list(shared_labels(splits)):
        one, twin, _ = labels[0]
        found.append(f"{len(labels)} images have the label file of another, such as {one} that of {twin}")
    if again := repeated_names(listing.names):
        name, numbers = next(iter(again.items()))
        found.append(f"the classes {', '.join(map(str, numbers))} are all called {name!r} and count apart")
    if classes := unlearnable_classes(listing.names, splits, scans):
        told = ", ".join(repr(listing.names[number]) for number in classes)
        found.append(f"train has no box of {told}, which other splits have")
    if found:
        _log.warning("%s: %s. %s", listing.path, "; ".join(found), advice_of(listing))


def _or_leave_out(split: str) -> str:
    return " Or leave the key 'test' out: a training needs only train and val." if split == "test" else ""


def _refuse_or_warn(
    listing: Listing, scans: Mapping[Path, Scan], corrupt: list[Path], on_corrupt: str
) -> None:
    """Refuse files that cannot be used, or warn that they are left out."""
    advice = advice_of(listing)
    if on_corrupt != "skip":
        _, first = problems_of(corrupt[0], listing, scans)[0]
        others = f" {len(corrupt)} of {len(scans)} images cannot be used." if len(corrupt) > 1 else ""
        raise DataError(f"{first}{others} Or go on without: dataset.on_corrupt=skip. {advice}")
    listed = ", ".join(str(path) for path in corrupt[:_LISTED])
    listed += ", ..." if len(corrupt) > _LISTED else ""
    _log.warning(
        "Left out %d of %d images that cannot be used: %s. %s", len(corrupt), len(scans), listed, advice
    )


def _require_images(splits: Mapping[str, tuple[Sample, ...]], yaml_path: Path) -> None:
    for split in SPLITS:
        if not splits.get(split) and (split in splits or split != "test"):
            do = f"Put images where the key {split!r} points.{_or_leave_out(split)}"
            raise DataError(expected(f"the split {split!r} of {yaml_path}", "at least one image", 0, do))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        spec = read_yaml(text)
        # Of yes, no, null, 1.0 and 2024-01-01 as names YAML would make truth values, numbers and dates.
        written = yaml.load(text, Loader=yaml.BaseLoader)
    except FileNotFoundError:
        do = "Correct dataset.path."
        raise DataError(expected("the data yaml", "an existing file", str(path), do)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"Cannot read the data yaml {path}: {reason}. Correct it.") from error
    if not isinstance(spec, dict):
        do = "Write the keys path, train, val and names."
        raise DataError(expected(f"the data yaml {path}", "a map of keys", spec, do))
    return {**spec, "names as written": written.get("names")}


def _read_names(spec: dict[str, Any], path: Path) -> tuple[str, ...]:
    names = spec["names as written"]
    if isinstance(names, dict):
        ids = {str(class_id): name for class_id, name in names.items()}
        if set(ids) == {str(number) for number in range(len(names))}:
            names = [ids[str(number)] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        do = "List the class names, or map them from ids 0, 1, 2, ..."
        raise DataError(expected(f"names of {path}", "a list of class names", names, do))
    if spec.get("nc", len(names)) != len(names):
        do = "Leave out nc, or correct names."
        raise DataError(expected(f"nc of {path}", f"the number of names ({len(names)})", spec["nc"], do))
    return tuple(whole_text(str(name)) for name in names)


def _read_keypoints(spec: dict[str, Any], path: Path) -> int | None:
    """How many numbers of keypoints follow a box; 0: none; None: that is not said."""
    shape = spec.get("kpt_shape")
    if shape is None:
        return 0 if "kpt_shape" in spec else None
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        do = "For example [17, 3]; leave it out where no keypoints follow the boxes."
        raise DataError(expected(f"kpt_shape of {path}", "count and numbers of keypoints", shape, do))
    return int(shape[0] * shape[1])


def _find_root(spec: dict[str, Any], yaml_path: Path) -> tuple[Path, str]:
    """The root of a data set; and where it does not exist, a hint for messages where it was looked for."""
    given = expanded(str(spec.get("path") or "."))
    here = (yaml_path.absolute().parent / given).resolve()
    from_cwd = Path.cwd() / given
    if here.is_dir() or given.is_absolute():
        return here, ""
    if from_cwd.is_dir():  # the yaml was written for a trainer that is started there
        return from_cwd.resolve(), ""
    return here, f" (its path {str(given)!r} is neither in the yaml's folder nor in {Path.cwd()})"


def _images_of(
    split: str, entry: Any, root: Path, hint: str, yaml_path: Path, missing: dict[Path, str]
) -> list[Path]:  # fmt: skip
    """The images of a split, sorted.

    Args:
        split: its name.
        entry: the yaml's value for it.
        root: see `_find_root`, as ``hint``.
        hint: ends the message where ``entry`` does not exist.
        yaml_path: for messages.
        missing: gets the listed images that do not exist.
    """
    images: set[Path] = set()
    for item in entry if isinstance(entry, list) else [entry]:
        place = _resolve(str(item), root)
        if place.is_dir():
            images.update(_images_below(place))
        elif _is_image(place.name) and place.is_file():
            images.add(place)
        elif place.is_file():
            images.update(_listed_images(place, root, missing))
        else:
            got = f"{root / expanded(str(item))}{hint}"
            what, do = f"the split {split!r} of {yaml_path}", f"Correct the path.{_or_leave_out(split)}"
            raise DataError(expected(what, "an existing folder or list of images", got, do))
    # Sort as paths, part by part. With 10 000 of them, comparing texts is faster than comparing paths.
    return sorted(images, key=lambda image: str(image).replace(os.sep, "\0"))


def _resolve(item: str, root: Path) -> Path:
    """The path that an item of a split means."""
    place = root / expanded(item)
    # As upstream: exports of labelling services write ../train/images and mean train/images.
    inside = root / item.removeprefix("../")
    return inside if item.startswith("../") and not place.exists() and inside.exists() else place


def _is_image(name: str) -> bool:
    # Names that begin with a dot are by-products of operating systems, such as ._photo.jpg of macOS.
    # os.path is faster than Path, which counts with many thousand files.
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")  # noqa: PTH122


def _images_below(folder: Path) -> Iterator[Path]:
    """Images in a folder and in all folders below it, linked ones too; each folder is visited once."""
    seen = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(place, name) for name in files if _is_image(name))


def _listed_images(listing: Path, root: Path, missing: dict[Path, str]) -> Iterator[Path]:
    """The images that a text file lists; those that do not exist are added to ``missing``."""
    try:
        lines = os.fsdecode(listing.read_bytes().removeprefix(BOM_UTF8)).splitlines()  # names are any bytes
    except OSError as error:
        raise DataError(f"Cannot read the list of images {listing}: {error}. Correct it.") from error
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line:
            continue
        line = line.replace("\0", "\ufffd")  # of no file
        # As upstream: ./x is relative to the list's own folder, x to the root of the data set.
        starts = (listing.parent, root) if line.startswith("./") else (root, listing.parent)
        spellings = dict.fromkeys((line, line.replace("\\", "/")))  # lists may come from Windows
        places = [start / spelling for spelling in spellings for start in starts]
        image = next((place for place in places if place.is_file()), None)
        if image is None:
            image = places[0]
            missing[image] = f"{listing}:{number}"
        yield image


class _Labels:
    """Finds label files; in each folder it looks once for suffixes in capitals."""

    def __init__(self) -> None:
        self._in_capitals: dict[str, dict[str, str]] = {}

    def of(self, image: Path) -> Path:
        """The label file of an image: ``x.txt``, or ``x.TXT`` where only that exists."""
        label = _label_of(image)
        folder, name = os.path.split(label)
        if folder not in self._in_capitals:
            names = set(os.listdir(folder)) if os.path.isdir(folder) else set[str]()  # noqa: PTH112, PTH208
            odd = {f"{n[:-4]}.txt": n for n in names if n.lower().endswith(".txt") and n[-4:] != ".txt"}
            self._in_capitals[folder] = {n: spelt for n, spelt in odd.items() if n not in names}
        spelt = self._in_capitals[folder].get(name)
        return label.with_name(spelt) if spelt else label


def _label_of(image: Path) -> Path:
    before, _, after = str(image).rpartition(f"{os.sep}images{os.sep}")
    place = f"{before}{os.sep}labels{os.sep}{after}" if before else after
    return Path(f"{os.path.splitext(place)[0]}.txt")  # noqa: PTH122 - see _is_image


def _digest(
    root: Path, names: tuple[str, ...], splits: Mapping[str, Iterable[Sample]], scans: Mapping[Path, Scan]
) -> str:
    """See `DetectionDataset`."""
    digest = hashlib.sha256(repr(names).encode())
    inside = f"{root}{os.sep}"
    for split, samples in sorted(splits.items()):
        for sample in samples:
            scan = scans[sample.image]
            if sample.keypoints:  # they decide what the numbers of a label mean
                digest.update(f"\0{sample.keypoints}".encode())
            files = (str(sample.image), scan.image_sha256), (str(sample.label), scan.label_sha256)
            for path, sha256 in files:
                plain = path.startswith(inside) and ".." not in path
                relative = path[len(inside) :] if plain else os.path.relpath(path, root)
                digest.update(os.fsencode(f"\0{split}\0{relative.replace(os.sep, '/')}\0"))
                digest.update(bytes.fromhex(sha256))
    return digest.hexdigest()
