"""Public data sets, converted from the archives that the configuration names.

Images and annotations are read out of the archives, which are never unpacked. A data set is written
whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from sparse_exp.data.archives import Tree, open_tree
from sparse_exp.data.convert import read_voc, write_converted
from sparse_exp.data.images import IMAGE_SUFFIXES
from sparse_exp.data.writing import write_once, write_yaml
from sparse_exp.errors import DataError, expected

VERSION = "1"
# The splits of YOLOv5's VOC.yaml: all images with boxes but those of the 2007 test set are for training.
VOC_SETS: Mapping[str, Sequence[str]] = {
    "train": ("VOC2007/trainval", "VOC2012/trainval"),
    "val": ("VOC2007/test",),
}
# Category names of COCO (https://cocodataset.org), in the order of their ids.
COCO_NAMES = tuple(
    """person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|
    parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|
    tie|suitcase|frisbee|skis|snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|
    tennis racket|bottle|wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|
    hot dog|pizza|donut|cake|chair|couch|potted plant|bed|dining table|toilet|tv|laptop|mouse|remote|keyboard|
    cell phone|microwave|oven|toaster|sink|refrigerator|book|clock|vase|scissors|teddy bear|hair drier|
    toothbrush""".replace("\n    ", "").split("|")
)


def materialize_voc(archives: Sequence[Path], destination: Path) -> Path:
    """Convert Pascal VOC 2007 and 2012, unless that has been done before.

    Args:
        archives: the tars (or zips) of 2007 trainval, 2007 test and 2012 trainval.
        destination: directory of the data set.

    Returns:
        Path of its ``data.yaml``.

    Raises:
        DataError: an archive is missing, damaged, or not one of these.
    """

    def build(folder: Path) -> None:
        with open_tree(archives) as tree:
            converted = read_voc(tree, VOC_SETS)
            lost = converted.dropped["images not found"]
            if lost:
                raise DataError(f"{lost} images are not in {tree.place}. Get the archives again.")
            write_converted(converted, tree, folder)

    return write_once(destination, VERSION, build)


def materialize_coco128(archives: Sequence[Path], destination: Path) -> Path:
    """Copy the 128 images of COCO that Ultralytics published with labels, unless that has been done before.

    They are both ``train`` and ``val``, as upstream: an mAP measured on them says how well a model has
    learned them by heart.

    Args:
        archives: the zip with ``images/*/*.jpg`` and ``labels/*/*.txt``.
        destination: directory of the data set.

    Returns:
        Path of its ``data.yaml``.

    Raises:
        DataError: the archive is damaged, or not that one.
    """

    def build(folder: Path) -> None:
        with open_tree(archives) as tree:
            _copy_labelled(tree, folder)
        write_yaml(folder, COCO_NAMES, {"train": "images/train", "val": "images/train"})

    return write_once(destination, VERSION, build)


def _copy_labelled(tree: Tree, folder: Path) -> None:
    """Copy all images of a tree, and their label files if there are any, into ``train``."""
    names = [PurePosixPath(name) for name in sorted(tree.readers)]
    images = [name for name in names if name.suffix.lower() in IMAGE_SUFFIXES and "images" in name.parts]
    if not images:
        raise DataError(expected(tree.place, "a data set with images/*/*.jpg", 0, "Get the archive again."))
    for kind in ("images", "labels"):
        (folder / kind / "train").mkdir(parents=True)
    for image in images:
        (folder / "images" / "train" / image.name).write_bytes(tree.read(str(image)))
        parts = ["labels" if part == "images" else part for part in image.parts]
        label = PurePosixPath(*parts).with_suffix(".txt")
        if str(label) in tree.readers:
            (folder / "labels" / "train" / label.name).write_bytes(tree.read(str(label)))
