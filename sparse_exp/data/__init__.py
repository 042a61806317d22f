"""Detection data: one format, embedded data sets, augmentation and loading."""

from __future__ import annotations

from pathlib import Path

from sparse_exp.config.schema import DatasetConfig
from sparse_exp.data.detection import (
    DetectionDataset,
    Sample,
    check_dataset,
    evenly_spread,
    load_dataset,
)
from sparse_exp.data.images import read_image
from sparse_exp.errors import DataError

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


def prepare(dataset: DatasetConfig, cache: Path) -> DetectionDataset:
    """Make a data set ready to read, building or fetching what is missing.

    Args:
        dataset: ``path`` is read where it lies; else ``generator`` builds it in the cache.
        cache: see `sparse_exp.sources.cache.cache_directory`. It also keeps what was found out about
            images and labels, so that the next start only looks at what has changed.

    Raises:
        DataError: there is no such data set, or it cannot be used.
        SourceUnavailable: what the generator reads cannot be had.
    """
    yaml_path = Path(dataset.path).expanduser() if dataset.path else _materialize(dataset, cache)
    return load_dataset(yaml_path, dataset.name, cache=cache, on_corrupt=dataset.on_corrupt)


def is_prepared(dataset: DatasetConfig, cache: Path) -> bool:
    """Whether `prepare` would neither fetch nor build anything; never uses the network."""
    from sparse_exp.data.writing import is_written

    if dataset.path:
        return Path(dataset.path).expanduser().is_file()
    return is_written(_place(dataset, cache))


def _place(dataset: DatasetConfig, cache: Path) -> Path:
    from sparse_exp.data import digits, public, trees

    versions = {
        "digits": digits.VERSION, "trees": trees.VERSION, "coco128": public.VERSION, "voc": public.VERSION,
    }  # fmt: skip
    if dataset.generator not in versions:
        do = f"Set dataset.path=YAML, or dataset.generator to one of {', '.join(versions)}."
        raise DataError(f"The data set {dataset.name!r} has neither a path nor a known generator. {do}")
    return cache / "datasets" / f"{dataset.generator}-{versions[dataset.generator]}"


def _materialize(dataset: DatasetConfig, cache: Path) -> Path:
    from sparse_exp.data import digits, public, trees
    from sparse_exp.data.writing import is_written

    place = _place(dataset, cache)
    if is_written(place):
        return place / "data.yaml"
    if dataset.generator == "digits":
        return digits.materialize(place)
    archives = _fetch_sources(dataset, cache)
    if dataset.generator == "trees":
        return trees.materialize(archives[0], place)
    build = public.materialize_voc if dataset.generator == "voc" else public.materialize_coco128
    return build(archives, place)


def _fetch_sources(dataset: DatasetConfig, cache: Path) -> list[Path]:
    from sparse_exp.sources.cache import fetch

    if not dataset.sources:
        do = "Set dataset.sources to the files that it is made from."
        raise DataError(f"The data set {dataset.name!r} has no sources. {do}")
    return [fetch(source, cache).path for source in dataset.sources]
