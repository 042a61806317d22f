"""Detection data: one format, embedded data sets, augmentation and loading."""

from __future__ import annotations

from pathlib import Path

from sparse_exp.config.schema import DatasetConfig
from sparse_exp.data.detection import DetectionDataset, Sample, check_dataset, load_dataset, read_image
from sparse_exp.errors import DataError

__all__ = [
    "DetectionDataset",
    "Sample",
    "check_dataset",
    "is_prepared",
    "load_dataset",
    "prepare",
    "read_image",
]


def prepare(dataset: DatasetConfig, cache: Path) -> DetectionDataset:
    """Make a data set ready to read, building or fetching what is missing.

    Args:
        dataset: ``path`` is read where it lies; else ``generator`` builds it in the cache.
        cache: see `sparse_exp.zoo.sources.cache_directory`.

    Raises:
        DataError: there is no such data set, or it cannot be used.
        SourceUnavailable: the package that the generator reads cannot be had.
    """
    if dataset.path:
        return load_dataset(Path(dataset.path).expanduser(), dataset.name)
    place = _place(dataset, cache)
    if dataset.generator == "digits":
        from sparse_exp.data import digits

        return load_dataset(digits.materialize(place), dataset.name)
    return load_dataset(_prepare_trees(dataset, cache, place), dataset.name)


def is_prepared(dataset: DatasetConfig, cache: Path) -> bool:
    """Whether `prepare` would neither fetch nor build anything; never uses the network."""
    from sparse_exp.data.writing import is_written

    if dataset.path:
        return Path(dataset.path).expanduser().is_file()
    return is_written(_place(dataset, cache))


def _place(dataset: DatasetConfig, cache: Path) -> Path:
    from sparse_exp.data import digits, trees

    versions = {"digits": digits.VERSION, "trees": trees.VERSION}
    if dataset.generator not in versions:
        do = "Set dataset.path=YAML, or dataset.generator to one of trees, digits."
        raise DataError(f"The data set {dataset.name!r} has neither a path nor a known generator. {do}")
    return cache / "datasets" / f"{dataset.generator}-{versions[dataset.generator]}"


def _prepare_trees(dataset: DatasetConfig, cache: Path, place: Path) -> Path:
    from sparse_exp.data import trees
    from sparse_exp.data.writing import is_written
    from sparse_exp.zoo.sources import fetch

    if is_written(place):
        return place / "data.yaml"
    if dataset.source is None:
        do = "Set dataset.source.uri to the package that holds the photos."
        raise DataError(f"The data set {dataset.name!r} has no source. {do}")
    return trees.materialize(fetch(dataset.source, cache).path, place)
