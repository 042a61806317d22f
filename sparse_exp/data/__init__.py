"""Detection data: one format for all data sets, those built here included; augmentation and loading."""

from __future__ import annotations

from pathlib import Path

from sparse_exp.config.schema import DatasetConfig
from sparse_exp.data import digits, public, trees
from sparse_exp.data.detection import (
    DetectionDataset,
    Sample,
    check_dataset,
    evenly_spread,
    load_dataset,
)
from sparse_exp.data.images import read_image
from sparse_exp.data.writing import is_written
from sparse_exp.errors import DataError
from sparse_exp.files import expanded
from sparse_exp.sources.cache import fetch

__all__ = [
    "DetectionDataset",
    "Sample",
    "check_dataset",
    "evenly_spread",
    "is_prepared",
    "load_dataset",
    "prepare",
    "read_image",
]
_VERSIONS = {
    "digits": digits.VERSION,
    "trees": trees.VERSION,
    "coco128": public.VERSION,
    "voc": public.VERSION,
}


def prepare(dataset: DatasetConfig, cache: Path) -> DetectionDataset:
    """Make a data set ready to read; build or fetch what is missing.

    Args:
        dataset: ``path`` is read where it lies; without one, ``generator`` builds the data set in the cache.
        cache: see `sparse_exp.sources.cache.cache_directory`. It also keeps the results of checking images
            and labels, so that the next start checks only files that have changed.

    Raises:
        DataError: there is no such data set, or it cannot be used.
        SourceUnavailable: a file that the generator reads cannot be had.
    """
    yaml_path = expanded(dataset.path) if dataset.path else _generate(dataset, cache)
    return load_dataset(yaml_path, dataset.name, cache=cache, on_corrupt=dataset.on_corrupt)


def is_prepared(dataset: DatasetConfig, cache: Path) -> bool:
    """Whether `prepare` would neither fetch nor build anything; never uses the network."""
    if dataset.path:
        return expanded(dataset.path).is_file()
    return is_written(_generated_folder(dataset, cache))


def _generated_folder(dataset: DatasetConfig, cache: Path) -> Path:
    """The folder in the cache that the data set's generator fills."""
    if dataset.generator not in _VERSIONS:
        do = f"Set dataset.path=YAML, or dataset.generator to one of {', '.join(_VERSIONS)}."
        raise DataError(f"The data set {dataset.name!r} has neither a path nor a known generator. {do}")
    return cache / "datasets" / f"{dataset.generator}-{_VERSIONS[dataset.generator]}"


def _generate(dataset: DatasetConfig, cache: Path) -> Path:
    """Build a data set in the cache unless it is there; returns the path of its data yaml."""
    folder = _generated_folder(dataset, cache)
    if is_written(folder):
        return folder / "data.yaml"
    if dataset.generator == "digits":
        return digits.materialize(folder)
    if not dataset.sources:
        do = "Set dataset.sources to the files that it is made from."
        raise DataError(f"The data set {dataset.name!r} has no sources. {do}")
    archives = [fetch(source, cache).path for source in dataset.sources]
    if dataset.generator == "trees":
        return trees.materialize(archives[0], folder)
    build = public.materialize_voc if dataset.generator == "voc" else public.materialize_coco128
    return build(archives, folder)
