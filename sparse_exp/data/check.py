"""Find everything that is wrong or unusual in a data set, in one pass."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_exp.config.imgsz import STRIDE, Imgsz, imgsz_of, in_words, sides
from sparse_exp.config.schema import LossConfig
from sparse_exp.data.detection import (
    Listing,
    Sample,
    boxes_of,
    list_dataset,
    problems_of,
    repeated_names,
    scan_listing,
    shared_images,
    shared_labels,
    unclear_lines,
    unlearnable_classes,
    without_boxes,
)
from sparse_exp.data.images import IMAGE_SUFFIXES
from sparse_exp.data.labels import parse_labels
from sparse_exp.data.letterbox import fitted_size
from sparse_exp.data.scan import EMPTY, Scan
from sparse_exp.metrics.anchors import LEAST_RECALL, PUBLISHED, best_possible_recall

_SMALL, _MEDIUM = 32**2, 96**2  # upper bounds of a box's area, px² at imgsz, as in COCO's metrics
_TINY = 3.0  # px at imgsz, of a box's shorter side; the finest stride of YOLOv5 is 8
_NEARLY_ALL = 0.95  # share of the images that the size which is proposed shows as large as a square does
_LONG = 8.0  # ratio of an image's sides above which most of a letterboxed square is grey


@dataclass(frozen=True)
class Finding:
    """One problem.

    Attributes:
        level: ``error``: a run refuses it; ``warning``: worth a look.
        kind: name of this kind of problem.
        where: the file or, in a label file, ``file:line``; for a problem of a class, its name.
        message: what is wrong and what to do.
    """

    level: str
    kind: str
    where: str
    message: str


@dataclass
class SplitFacts:
    """Counts and sizes of the images and boxes of a split.

    Attributes:
        images: number of images.
        unusable: images that cannot be read or have damaged labels; all that follows leaves them out.
        background: images without a box.
        boxes: number of boxes.
        classes: number of boxes of each class id.
        small: share of boxes below 32 x 32 px at imgsz, 0..1.
        medium: share of boxes from there to below 96 x 96 px.
        large: share of larger boxes.
        with_anchor: share of boxes that one of the published anchors answers for, 0..1.
        with_anchor_by_class: the same of the boxes of each class id.
        median_side: median of the boxes' sides (roots of their areas), px at imgsz; 0 without boxes.
        widest: largest ratio of an image's width to its height.
        narrowest: smallest ratio of an image's width to its height.
    """

    images: int = 0
    unusable: int = 0
    background: int = 0
    boxes: int = 0
    classes: dict[int, int] = field(default_factory=dict)
    small: float = 0.0
    medium: float = 0.0
    large: float = 0.0
    with_anchor: float = 1.0
    with_anchor_by_class: dict[int, float] = field(default_factory=dict)
    median_side: float = 0.0
    widest: float = 0.0
    narrowest: float = 0.0


@dataclass(frozen=True)
class Report:
    """The result of `inspect`.

    Attributes:
        path: of the data yaml.
        imgsz: size that images are fitted into; sizes of boxes refer to it.
        fitting: least size of images that shows nearly all images as large as a square of the longer side of
            ``imgsz`` would; 0 where no image can be read.
        names: class names.
        splits: facts by split.
        findings: all problems, errors first.
    """

    path: str
    imgsz: Imgsz
    fitting: Imgsz
    names: tuple[str, ...]
    splits: dict[str, SplitFacts]
    findings: list[Finding]

    @property
    def errors(self) -> int:
        """Number of findings of level ``error``."""
        return sum(finding.level == "error" for finding in self.findings)

    @property
    def saved(self) -> float:
        """Share of the pixels, and so of the work, that ``fitting`` saves against the square, 0..1."""
        own = sides(self.fitting)
        return 1 - math.prod(own) / max(own) ** 2 if max(own) else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for json."""
        counts = {"errors": self.errors, "warnings": len(self.findings) - self.errors}
        return {**asdict(self), "saved": self.saved, **counts}


def inspect(yaml_path: Path, imgsz: Imgsz, cache: Path | None = None) -> Report:
    """Check every image and label of a data set.

    Args:
        yaml_path: the data yaml.
        imgsz: size that images will be fitted into.
        cache: see `sparse_exp.data.detection.load_dataset`.

    Raises:
        DataError: the yaml itself is wrong.
    """
    listing = list_dataset(yaml_path)
    scans = scan_listing(listing, cache)
    facts = {split: _facts_of(samples, listing, scans, imgsz) for split, samples in listing.splits.items()}
    findings = [
        *_unusable_files(listing, scans),
        *_unclear_lines(listing, scans),
        *_repeated_images(listing, scans),
        *_shared_labels(listing),
        *_repeated_names(listing),
        *_unlearnable_classes(listing, scans, facts),
        *_odd_boxes(listing, scans, imgsz),
        *_missing_labels(listing, scans),
        *_stray_labels(listing),
        *_long_images(scans),
        *_boxes_without_anchor(listing, facts),
    ]
    findings.sort(key=lambda finding: finding.level)  # stable: errors, then warnings
    return Report(str(yaml_path), imgsz, _fitting(scans, imgsz), listing.names, facts, findings)


def _fitting(scans: Mapping[Path, Scan], imgsz: Imgsz) -> Imgsz:
    """See `Report.fitting`; one image in twenty may be shown smaller."""
    longer = max(sides(imgsz))
    fitted = [fitted_size(scan.width, scan.height, longer) for scan in scans.values() if scan.width]
    if not fitted:
        return 0
    width, height = np.quantile(np.array(fitted), _NEARLY_ALL, axis=0, method="higher").tolist()
    return imgsz_of([math.ceil(side / STRIDE) * STRIDE for side in (height, width)])


def _sides(scan: Scan, imgsz: Imgsz) -> NDArray[np.float32]:
    """Width and height (M, 2) of an image's boxes once the image fits ``imgsz``, px."""
    if not scan.width:
        return np.zeros((0, 2), np.float32)
    return boxes_of(scan)[:, 3:] * np.array(fitted_size(scan.width, scan.height, imgsz), np.float32)


def _usable(listing: Listing, scans: Mapping[Path, Scan]) -> dict[str, list[Sample]]:
    """The images of each split that can be read, with labels that can."""
    return {split: _usable_of(samples, listing, scans) for split, samples in listing.splits.items()}


def _usable_of(samples: Sequence[Sample], listing: Listing, scans: Mapping[Path, Scan]) -> list[Sample]:
    return [s for s in samples if s.image not in listing.missing and not scans[s.image].problems]


def _facts_of(
    samples: Sequence[Sample], listing: Listing, scans: Mapping[Path, Scan], imgsz: Imgsz
) -> SplitFacts:
    usable = [scans[sample.image] for sample in _usable_of(samples, listing, scans)]
    facts = SplitFacts(len(samples), len(samples) - len(usable), sum(not scan.boxes for scan in usable))
    if not usable:
        return facts
    ids = np.concatenate([boxes_of(scan)[:, 0] for scan in usable]).astype(int)
    sides = np.concatenate([_sides(scan, imgsz) for scan in usable])
    ratios = [scan.width / scan.height for scan in usable]
    facts.widest, facts.narrowest = max(ratios), min(ratios)
    facts.boxes, facts.classes = len(ids), dict(sorted(Counter(ids.tolist()).items()))
    if len(ids):
        areas = sides.prod(1)
        facts.small, facts.large = float((areas < _SMALL).mean()), float((areas >= _MEDIUM).mean())
        facts.medium = 1 - facts.small - facts.large
        anchors, anchor_t = np.array(PUBLISHED), LossConfig().anchor_t
        facts.with_anchor = best_possible_recall(sides, anchors, anchor_t)
        facts.with_anchor_by_class = {
            number: best_possible_recall(sides[ids == number], anchors, anchor_t) for number in facts.classes
        }
        facts.median_side = float(np.median(np.sqrt(areas)))
    return facts


def _unusable_files(listing: Listing, scans: Mapping[Path, Scan]) -> Iterator[Finding]:
    for image, scan in scans.items():
        for where, problem in problems_of(image, listing, scans):
            bad = "bad image" if where == str(image) else "bad label"
            kind = "missing image" if scan.stamp[0] < 0 else bad
            yield Finding("error", kind, where, problem)


def _unclear_lines(listing: Listing, scans: Mapping[Path, Scan]) -> Iterator[Finding]:
    """Lines that may be polygons, or boxes with keypoints."""
    if unclear := unclear_lines(listing, scans):
        yield Finding("error", "unclear labels", *unclear)


def _repeated_images(listing: Listing, scans: Mapping[Path, Scan]) -> Iterator[Finding]:
    """Images that are in two splits, or in one split twice."""
    trained = {sample.image for sample in listing.splits["train"]}
    for split, samples in listing.splits.items():
        if split != "train" and trained.issuperset(sample.image for sample in samples):
            text = f"{split} is part of train. Its mAP says nothing about images that the model has not seen."
            yield Finding("warning", "no split of its own", str(listing.path), text)
            continue
        first: dict[str, Path] = {}
        for sample in samples:
            other = first.setdefault(scans[sample.image].image_sha256, sample.image)
            if other != sample.image and scans[sample.image].image_sha256 != EMPTY:
                text = f"The same image as {other}, also in {split}. Remove one of them."
                yield Finding("warning", "duplicate image", str(sample.image), text)
    for split, image, seen_in, other in shared_images(listing.splits, scans):
        text = f"In {split}, but the same image as {other} of {seen_in}, so that its accuracy is too good."
        yield Finding("warning", "leak", str(image), f"{text} Keep it in one split.")


def _shared_labels(listing: Listing) -> Iterator[Finding]:
    for image, other, label in shared_labels(listing.splits):
        text = f"Its label file {label} is also that of {other}. Rename one of them, or remove it."
        yield Finding("warning", "shared label file", str(image), text)


def _repeated_names(listing: Listing) -> Iterator[Finding]:
    for name, numbers in repeated_names(listing.names).items():
        text = f"The classes {', '.join(map(str, numbers))} have this name, and count apart."
        yield Finding("warning", "class name twice", name, f"{text} Rename one, or join them in the labels.")


def _unlearnable_classes(
    listing: Listing, scans: Mapping[Path, Scan], facts: Mapping[str, SplitFacts]
) -> Iterator[Finding]:
    only_elsewhere = unlearnable_classes(listing.names, _usable(listing, scans), scans)
    for class_id, name in enumerate(listing.names):
        if class_id in only_elsewhere:
            text = (
                f"Class {class_id} is in {', '.join(only_elsewhere[class_id])} only, so it cannot be learned."
            )
            yield Finding("warning", "class not in train", name, f"{text} Move images of it into train.")
        elif not any(class_id in one.classes for one in facts.values()):
            text = f"Class {class_id} has no box. Remove it from names if that is no mistake."
            yield Finding("warning", "class never seen", name, text)


def _odd_boxes(listing: Listing, scans: Mapping[Path, Scan], imgsz: Imgsz) -> Iterator[Finding]:
    """Boxes that stand in a label file twice, and tiny ones."""
    labels = {sample.image: sample.label for samples in listing.splits.values() for sample in samples}
    for image, scan in scans.items():
        sides = _sides(scan, imgsz)
        tiny = [index for index, side in enumerate(sides.tolist()) if min(side) < _TINY]
        if not scan.repeated and not tiny:
            continue
        file = labels[image]
        parsed = parse_labels(file.read_bytes(), len(listing.names), file, listing.keypoints)
        lines = parsed.lines
        for line, before in parsed.repeated:
            text = f"The box of line {before} again, which counts once. Remove one of them."
            yield Finding("warning", "duplicate box", f"{file}:{line}", text)
        for index in tiny:
            w, h = sides[index]
            size = f"{w:.1f} x {h:.1f} px at {in_words(imgsz)} px"
            text = f"{size}: too small to learn. Use a larger imgsz, or tiles."
            yield Finding("warning", "tiny box", f"{labels[image]}:{lines[index]}", text)


def _missing_labels(listing: Listing, scans: Mapping[Path, Scan]) -> Iterator[Finding]:
    for split, samples in listing.splits.items():
        without = [sample for sample in samples if not scans[sample.image].has_label]
        usable = _usable_of(samples, listing, scans)
        if problem := without_boxes(split, usable or samples, scans):
            yield Finding("error", "no labels", str(listing.path), problem)
        elif without:
            text = f"{len(without)} of {len(samples)} images have no label file and count as background"
            yield Finding("warning", "no label file", str(without[0].image), f"{text}, this one first.")


def _stray_labels(listing: Listing) -> Iterator[Finding]:
    """Label files without an image."""
    folders: dict[Path, set[Path]] = defaultdict(set)
    for samples in listing.splits.values():
        for sample in samples:
            folders[sample.label.parent].add(sample.image.parent)
    for labels, images in sorted(folders.items()):
        if labels in images or not labels.is_dir():
            continue  # a text file beside images need not be a label file
        stems = {
            path.stem for folder in images if folder.is_dir() for path in folder.iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES
        }  # fmt: skip
        for label in sorted(path for path in labels.iterdir() if path.suffix.lower() == ".txt"):
            if label.stem not in stems and label.name != "classes.txt":
                text = f"There is no image of this name in {', '.join(map(str, sorted(images)))}."
                yield Finding("warning", "label without image", str(label), text)


def _boxes_without_anchor(listing: Listing, facts: Mapping[str, SplitFacts]) -> Iterator[Finding]:
    share, do = facts["train"].with_anchor, "Choose another imgsz."
    if share < LEAST_RECALL:  # else anchors are not fitted
        do = "Set model.anchors=auto, or choose another imgsz."
        text = f"No published anchor answers for {1 - share:.1%} of the boxes in train: they are not learned."
        yield Finding("warning", "boxes without anchor", str(listing.path), f"{text} {do}")
    for number, of_class in facts["train"].with_anchor_by_class.items():
        if of_class < LEAST_RECALL and len(listing.names) > 1:
            text = f"No published anchor answers for {1 - of_class:.1%} of the boxes of this class in train."
            yield Finding("warning", "class without anchor", listing.names[number], f"{text} {do}")


def _long_images(scans: Mapping[Path, Scan]) -> Iterator[Finding]:
    for image, scan in scans.items():
        if scan.width and max(scan.width / scan.height, scan.height / scan.width) > _LONG:
            text = f"{scan.width} x {scan.height} px: most of the square will be grey. Cut it into tiles."
            yield Finding("warning", "long image", str(image), text)
